"""Lightning's Trainer with whole steps, checkpoints that are complete or absent, and no work inside signal handlers."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from causalrn.training.callbacks.checkpoints import keeps
from causalrn.training.checkpoint_io import BackgroundCheckpointIO, commit, partial_name
from causalrn.training.lightning_private import leave_signals_alone
from causalrn.training.trainer_settings import arguments_of, check_settings

# Their ranks write one folder together, at once; their own code decides how.
WRITE_FOLDERS = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class Trainer(L.Trainer):
    """Saves single files in the background and folders under another name first; leaves signals to `Preemption`.

    The arguments are Lightning's, with one difference: an int `val_check_interval` counts optimizer steps, not batches.

    Raises:
        ValueError: a setting that makes no sense or that a run cannot do.
    """

    def __init__(self, **settings: Any) -> None:
        check_settings(settings)
        # The dict is changed in place: the config parser finds Lightning's arguments where it is passed on by its name.
        settings.update(arguments_of(settings))
        try:
            super().__init__(**settings)
        except (TypeError, ImportError) as error:
            # Lightning raises these for settings of the wrong type, and for packages that they need.
            raise ValueError(f"trainer: {error}") from error

    def harden(self) -> None:
        """Called once, after construction."""
        if not isinstance(self.strategy, WRITE_FOLDERS):
            self.strategy.checkpoint_io = BackgroundCheckpointIO()
        leave_signals_alone(self)
        # Callbacks that save into one folder may give a file the same name, and each removes what it does not keep.
        remove = self.strategy.remove_checkpoint

        def remove_unless_kept(filepath: str | Path) -> None:
            if not any(keeps(callback, filepath) for callback in self.checkpoint_callbacks):
                remove(filepath)

        self.strategy.remove_checkpoint = remove_unless_kept

    def save_checkpoint(
        self, filepath: Any, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        if not isinstance(self.strategy, WRITE_FOLDERS):
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        path = Path(self.strategy.broadcast(filepath))
        temporary = partial_name(path)
        if self.is_global_zero and temporary.exists():
            # A kill has left it, maybe with files of more ranks than there are now.
            shutil.rmtree(temporary)
        self.strategy.barrier("room for a checkpoint")
        super().save_checkpoint(temporary, weights_only, storage_options)
        if self.is_global_zero:
            commit(temporary, path, not weights_only)
        self.strategy.barrier("checkpoint is complete")
