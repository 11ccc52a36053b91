"""Puts the counters of Lightning's loops as they stand between two steps, where a run goes on from a checkpoint."""

from typing import Any

import lightning as L

from causalrn.training.lightning_private import (
    count_logged_step,
    count_saved_step,
    validation_follows,
    wait_for_no_validation,
)


class ResumedLoops(L.Callback):
    """Makes a resumed run count epochs, call their hooks and number logged steps as the undisturbed run does.

    A checkpoint holds the counters as they were in the hook that saved it. Lightning (2.6) goes on rightly from the end
    of a validation. From other hooks it counts an epoch twice that was over, or one that `max_steps` only cut short, or
    takes one more batch in an epoch that was over without a validation.
    """

    def __init__(self) -> None:
        self.resumed = False
        # True where the hooks of the epoch's end have run already.
        self.between_epochs = False

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]
        epochs = [loops["epoch_progress"][part] for part in ("total", "current")]
        current = batches["current"]
        if not current["ready"]:
            return
        self.resumed = True
        # The epoch, or the training, had ended: an epoch that was cut short counts as processed then.
        ended = epochs[1]["processed"] == epochs[1]["ready"]
        if current["processed"] != current["ready"]:
            # An exception saved it: the step that did not end is taken again.
            batches["is_last_batch"] = False
            for part in (batches["total"], current):
                part |= dict.fromkeys(("ready", "started", "processed"), part["completed"])
        elif not ended and (
            current["ready"] % trainer.accumulate_grad_batches == 0 or batches["is_last_batch"]
        ):
            # Lightning counts a step for the loggers only after its validation.
            count_saved_step(loops)
        for part in (batches["total"], current):
            part["completed"] = part["ready"]
        self.between_epochs = ended and batches["is_last_batch"]
        done = trainer.max_steps != -1 and checkpoint["global_step"] >= trainer.max_steps
        for part in epochs:
            # The loop does not even start where all steps are taken.
            processed = part["ready"] - (0 if self.between_epochs or done else 1)
            part |= {"processed": processed, "completed": processed}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resumed, self.resumed = self.resumed, False
        if not resumed:
            return
        loop = trainer.fit_loop.epoch_loop
        if self.between_epochs:
            loop.restarting = False
        elif validation_follows(trainer):
            # The loop adds it again, after it has run this validation or left it out.
            count_logged_step(trainer, -1)
        elif loop.batch_progress.is_last_batch:
            wait_for_no_validation(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop.restarting:
            # It had nothing left to do in this epoch, and would end the following ones at once too.
            loop.on_iteration_done()
