"""One sequence over all ranks, for contexts that no single device holds."""

from contextlib import ExitStack
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from causalrn.models import LanguageModel, LinearRelation
from causalrn.ops.context_parallel import context_parallel


class ContextParallelStrategy(DDPStrategy):
    """Every rank trains on its consecutive part of the same sequences; layers exchange states of size O(B * D).

    Weights are replicated and gradients averaged, as under DDP. The batch is that of one process: all ranks read
    the same sequences, whose length they must divide. For models of `LinearRelation` layers.

    Args:
        kwargs: of Lightning's DDPStrategy.
    """

    strategy_name = "context_parallel"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.split = ExitStack()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}

    def setup(self, trainer: L.Trainer) -> None:
        network = getattr(trainer.lightning_module, "network", None)
        if isinstance(network, LanguageModel) and not all(
            isinstance(block.mixer, LinearRelation) and block.short_convolution is None
            for block in network.layers
        ):
            raise ValueError(
                f"{type(self).__name__} splits LinearRelation layers only: got {network.layer_names}"
            )
        super().setup(trainer)
        # A group of its own: its exchanges must not queue between the gradients' all-reduces.
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)
        self.split.enter_context(context_parallel(group))

    def teardown(self) -> None:
        self.split.close()
        super().teardown()
