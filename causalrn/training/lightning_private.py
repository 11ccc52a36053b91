"""Everything that is used of Lightning beyond its public interface: six names, in one function each, with the reason.

tests/training/test_lightning_private.py fails where a version of Lightning no longer has a name that is used here.
"""

from typing import Any

import lightning as L
from lightning.pytorch.loops.evaluation_loop import RestartStage


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether a validation comes after this training batch: a checkpoint that is written now must say that it is due.

    The public settings do not tell how Lightning combines epochs, steps, times and the last batch.
    """
    # It asks the fetcher only whether training steps take an iterator in place of a batch, which none here do.
    return trainer.fit_loop.epoch_loop._should_check_val_fx(None)  # pyright: ignore[reportArgumentType]


def begin_with_validation(trainer: L.Trainer) -> None:
    """Makes the training loop begin with the validation that was due when the checkpoint was written.

    Lightning has this state for checkpoints from within a validation, and goes on in its middle; this begins it anew.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
    loop.restarting = False


def count_logged_step(trainer: L.Trainer, change: int) -> None:
    """Corrects the number of steps that loggers are told, which Lightning adds to after a validation."""
    trainer.fit_loop.epoch_loop._batches_that_stepped += change


def count_saved_step(loops: dict[str, Any]) -> None:
    """The same in the loops of a checkpoint."""
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def wait_for_no_validation(trainer: L.Trainer) -> None:
    """Lets an epoch end that was over without a validation when the checkpoint was written: the loop waits for one."""
    trainer.fit_loop.epoch_loop.val_loop._has_run = True


def leave_signals_alone(trainer: L.Trainer) -> None:
    """Takes Lightning's signal handlers away.

    Its handler of SIGTERM runs a collective inside the handler, which can meet the collective that it interrupts. For
    that handler Lightning broadcasts a flag before every batch, which synchronises the device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
