"""How fast a run trains: seconds per optimizer step and tokens per second, validation left out."""

import time
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Logs `train/step_seconds` and `train/tokens_per_second` (over all ranks) with the Trainer's other metrics.

    Each value is the mean since the last logged step, so that work which a device does later is counted where
    the host waits for it.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start(trainer)

    def start(self, trainer: L.Trainer) -> None:
        self.since_seconds = time.perf_counter()
        self.since_step = trainer.global_step
        self.tokens = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_seconds = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.training:
            self.since_seconds += time.perf_counter() - self.validation_seconds

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        self.tokens += batch["tokens"].numel() * replicas
        steps = trainer.global_step - self.since_step
        every = getattr(trainer, "log_every_n_steps", 50)
        if steps and trainer.global_step % every == 0:
            seconds = time.perf_counter() - self.since_seconds
            pl_module.log("train/step_seconds", seconds / steps)
            pl_module.log("train/tokens_per_second", self.tokens / seconds)
            self.start(trainer)
