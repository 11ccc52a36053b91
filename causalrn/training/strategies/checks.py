"""Checks that save minutes: what would fail on every rank is one line before anything is started."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
)

from causalrn.training.consolidate import count_ranks, is_fsdp_folder, is_zero_folder
from causalrn.training.strategies.context_parallel import ContextParallelStrategy
from causalrn.training.strategies.zero import ZeroStrategy
from datamodules.ranges import check_batch_size


def check_run(trainer: L.Trainer, data: Any, checkpoint: Path | None) -> None:
    """Looks at the Trainer's settings together with the data and the checkpoint to continue from.

    Raises:
        ValueError: the accelerator, batch or checkpoint does not go with the strategy, or no run goes with it.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ZeroStrategy):
        strategy.check_accelerator()
    elif isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        raise ValueError(
            f"Lightning's own {type(strategy).__name__} accumulates or clips gradients otherwise than other strategies: want "
            "the overlay configs/trainer/fsdp.yaml or configs/trainer/deepspeed_zero2.yaml"
        )
    if (batch_size := getattr(data, "batch_size", None)) is not None:
        check_batch_size(batch_size, replicas(trainer))
    if checkpoint is not None:
        check_resume(strategy, checkpoint, trainer.num_devices * trainer.num_nodes)


def replicas(trainer: L.Trainer) -> int:
    """Parts that a batch is split into."""
    if isinstance(trainer.strategy, ContextParallelStrategy) or not isinstance(
        trainer.strategy, ParallelStrategy
    ):
        return 1
    return trainer.num_devices * trainer.num_nodes


def check_resume(strategy: Any, checkpoint: Path, ranks: int) -> None:
    """Raises a ValueError where only the ranks or the strategy that wrote a folder could continue from it."""
    whole = checkpoint.with_name(f"{checkpoint.stem}-whole.ckpt")
    advice = (
        f"want python -m causalrn.export consolidate {checkpoint} --output {whole}, then --resume {whole}"
    )
    if is_zero_folder(checkpoint):
        before, stage = count_ranks(checkpoint)
        origin = f"checkpoint {checkpoint} was written under ZeRO-{stage} by {before} ranks"
        if not isinstance(strategy, ZeroStrategy):
            raise ValueError(f"{origin} and {type(strategy).__name__} cannot read it: {advice}")
        if (before, stage) != (ranks, strategy.stage):
            raise ValueError(f"{origin}, and this run is ZeRO-{strategy.stage} on {ranks}: {advice}")
    elif is_fsdp_folder(checkpoint) and not isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            f"checkpoint {checkpoint} was written under FSDP and {type(strategy).__name__} cannot read it: {advice}"
        )
