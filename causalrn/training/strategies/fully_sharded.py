"""FSDP2: parameters, gradients and optimizer state lie sharded over all ranks, gathered block by block."""

from datetime import timedelta

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from causalrn.models import LanguageModel


class FullyShardedStrategy(ModelParallelStrategy):
    """Shards a language model over all ranks with `fully_shard`, one group per block.

    Parameters, optimizer state and the reduction of gradients are float32. Under `bf16-mixed` the blocks are
    gathered in bfloat16, the type that autocast would cast them to: the same arithmetic as under DDP, with half the
    traffic, and without the copies that autocast keeps for the backward pass.

    Args:
        save_distributed_checkpoint: every rank writes its shard into a folder; False writes one file, which needs
            room for the whole model and optimizer state on rank 0.
        timeout: of the collectives.
    """

    strategy_name = "fully_sharded"

    def __init__(
        self, save_distributed_checkpoint: bool = True, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, timeout=timeout)
        self.mesh: DeviceMesh | None = None

    @property
    def device_mesh(self) -> DeviceMesh:
        """All ranks along the axis of data: Lightning's own mesh has the ranks of a node along another axis."""
        if self.mesh is None:
            sizes, names = (self.world_size, 1), ("data_parallel", "tensor_parallel")
            self.mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
        return self.mesh

    def shard(self, network: LanguageModel) -> None:
        """Shards the blocks, then what is left; a network that is sharded already stays as it is."""
        if isinstance(network, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        mixed = getattr(self.precision_plugin, "precision", None) == "bf16-mixed"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if mixed else None,
            reduce_dtype=torch.float32 if mixed else None,
            # The residual stream stays float32, as under autocast alone.
            cast_forward_inputs=False,
        )
        for block in network.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh)
