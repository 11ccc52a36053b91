"""Looks into the relation layers at each validation: who contributes to whom, and how sharply."""

from typing import Any

import lightning as L
import torch

from causalrn.evaluation.diagnostics import probe, relation_of, trained_positions
from causalrn.models import LanguageModel
from causalrn.system import check_range
from causalrn.training.callbacks.log_steps import write_metrics
from causalrn.training.strategies import ContextParallelStrategy


class Diagnostics(L.Callback):
    """Logs `diagnostics/NAME/layer_NN` of a few validation sequences; docs/metrics.md tells what the names mean.

    Args:
        n_sequences: first sequences of the first validation set, on each rank; those of rank 0 are logged.
        n_positions: receiving positions to look at, evenly chosen among those with a target.
        every_n_validations: looks at every n-th validation only.
    """

    def __init__(self, n_sequences: int = 4, n_positions: int = 64, every_n_validations: int = 1) -> None:
        check_range(
            self,
            "[1, inf)",
            n_sequences=n_sequences,
            n_positions=n_positions,
            every_n_validations=every_n_validations,
        )
        self.n_sequences = n_sequences
        self.n_positions = n_positions
        self.every_n_validations = every_n_validations
        self.validations = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        network = getattr(pl_module, "network", None)
        if not isinstance(network, LanguageModel):
            raise ValueError(f"diagnostics are those of a LanguageModel: got {type(network).__name__}")
        if isinstance(trainer.strategy, ContextParallelStrategy):
            raise ValueError(
                "diagnostics look at whole sequences: want another strategy than ContextParallelStrategy"
            )
        for block in network.layers:
            relation_of(block)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validations += 1

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, torch.Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx or dataloader_idx or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if (self.validations - 1) % self.every_n_validations:
            return
        positions = trained_positions(batch["targets"], self.n_positions)
        if not len(positions):
            return
        network = pl_module.network
        assert isinstance(network, LanguageModel)
        # Every rank takes part: where weights are sharded, the network gathers them.
        layers = probe(network, batch["tokens"][: self.n_sequences], positions)
        write_metrics(
            trainer,
            {
                f"diagnostics/{name}/layer_{index:02d}": value
                for index, pairs in enumerate(layers)
                for name, value in pairs.summary().items()
            },
        )
