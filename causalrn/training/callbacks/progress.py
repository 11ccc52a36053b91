"""Progress of a run: a live bar on a terminal, plain lines anywhere else."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from causalrn.system import check_range


def progress_bar() -> ProgressBar:
    """The progress display that suits standard output."""
    return RichProgressBar(leave=True) if sys.stdout.isatty() else PlainProgress()


class PlainProgress(ProgressBar):
    """Prints one line at most every few seconds, and one after each validation.

    Args:
        every_n_seconds: shortest time between two training lines.
    """

    def __init__(self, every_n_seconds: float = 5.0) -> None:
        super().__init__()
        check_range(self, "[0, inf]", every_n_seconds=every_n_seconds)
        self.every_n_seconds = every_n_seconds
        self._enabled = True

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start_step = trainer.global_step
        self.start_seconds = self.last_seconds = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if now - self.last_seconds >= self.every_n_seconds:
            self.last_seconds = now
            self.print_line(trainer, now)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.last_seconds = time.monotonic()
            self.print_line(trainer, self.last_seconds)

    def print_line(self, trainer: L.Trainer, now: float) -> None:
        if not self._enabled:
            return
        step, last = trainer.global_step, trainer.max_steps
        rate = (step - self.start_step) / max(now - self.start_seconds, 1e-9)
        left = f", {(last - step) / rate:.0f} s left" if rate > 0 and last > 0 else ""
        metrics = trainer.progress_bar_metrics
        values = "".join(f"  {name} {value:.4g}" for name, value in metrics.items())
        total = f"/{last}" if last > 0 else ""
        print(f"step {step}{total}{values}  ({rate:.2f} steps/s{left})", flush=True)
