"""A run is saved after each validation and at its end, and the newest two are kept; a config may add ModelCheckpoints."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint with defaults for runs that may die at any moment.

    The newest two are kept, so that one is left where the newest turns out to be damaged, and the last step is saved
    also where no validation follows it. `last.ckpt` is a link to the newest (see causalrn.training.checkpoint_io.commit).

    Args:
        every_n_train_steps: save after every so many steps in place of after each validation.
        save_top_k: how many to keep; -1 keeps all.
        kwargs: of Lightning's ModelCheckpoint.
    """

    def __init__(self, every_n_train_steps: int | None = None, save_top_k: int = 2, **kwargs: Any) -> None:
        # The newest: those with the highest step.
        defaults = {"monitor": "step", "mode": "max", "enable_version_counter": False}
        super().__init__(
            every_n_train_steps=every_n_train_steps, save_top_k=save_top_k, **{**defaults, **kwargs}
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        step = trainer.global_step
        if self.monitor == "step" and step not in map(int, self.best_k_models.values()):
            # A method of Lightning's class that is meant for it alone: of the public ones, save_last writes a copy under
            # another name, and Trainer.save_checkpoint a file that is never removed.
            places = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(step)}
            self._save_topk_checkpoint(trainer, {**trainer.callback_metrics, **places})


def settle(callback: ModelCheckpoint) -> None:
    """Lets a config's own ModelCheckpoint save beside `Checkpoints`.

    Without a filename it names its files after what it monitors, since the default name is that of `Checkpoints`. Its
    `last.ckpt` is the link to the newest that every folder of checkpoints has anyway.
    """
    if callback.filename is None:
        prefix = (callback.monitor or "model").replace("/", "_")
        callback.filename = f"{prefix}-{{epoch}}-{{step}}"
    # In a folder of its own with save_top_k 0 nothing else is saved, and `last.ckpt` is a file.
    if callback.save_top_k != 0 or callback.dirpath is None:
        callback.save_last = None


def keeps(callback: Checkpoint, path: str | Path) -> bool:
    """Whether a callback counts this file among those that it has saved and still wants."""
    if not isinstance(callback, ModelCheckpoint):
        return False
    kept = {*callback.best_k_models, callback.best_model_path, callback.last_model_path} - {""}
    return Path(path).absolute() in {Path(name).absolute() for name in kept}
