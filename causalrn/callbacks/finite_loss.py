"""Stops a run whose loss is no longer finite, with one line that says where."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor


class FiniteLoss(L.Callback):
    """Raises a ValueError at a NaN or infinite training loss.

    Looked at after every step on the CPU; on a device, where a look costs a synchronisation, after every
    `every_n_batches`.
    """

    def __init__(self, every_n_batches: int = 50) -> None:
        self.every_n_batches = every_n_batches

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not isinstance(outputs, Mapping):
            return
        loss = outputs["loss"]
        if loss.device.type != "cpu" and batch_idx % self.every_n_batches:
            return
        if not torch.isfinite(loss):
            raise ValueError(
                f"training loss is {loss.item()} at step {trainer.global_step}; want a finite one: lower the "
                "learning rate, clip gradients, or set the norms' eps above 0"
            )
