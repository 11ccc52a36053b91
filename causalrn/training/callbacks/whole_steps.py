"""Keeps every optimizer step at the number of batches that it should have."""

import sys
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_only


class WholeSteps(L.Callback):
    """Refuses epochs that would end within a step, and keeps validations from falling into one.

    Lightning steps at the end of an epoch with whatever batches it has. Our DataModules end epochs where steps end;
    this looks at what `limit_train_batches` or another DataModule make of it.

    Its place among a checkpoint's callbacks tells that `val_check_interval` counts steps there: runs written before it
    counted batches.

    Args:
        val_check_interval: of the config, in optimizer steps where it is an int.
    """

    def __init__(self, val_check_interval: Any) -> None:
        self.val_check_interval = val_check_interval

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.align(trainer)
        per_step, progress = trainer.accumulate_grad_batches, trainer.fit_loop.epoch_loop.batch_progress
        begun = progress.current.processed % per_step  # pyright: ignore[reportAttributeAccessIssue]
        # A run may go on with another number of batches per step, or have been stopped by the clock within one.
        if begun and not progress.is_last_batch and trainer.is_global_zero:
            print(
                f"warning: this run continues within a step: its first one has {per_step - begun} batches in place of "
                f"{per_step}",
                file=sys.stderr,
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The epoch's loader may be a new one.
        self.align(trainer)

    def align(self, trainer: L.Trainer) -> None:
        """Puts validations at the ends of steps.

        Raises:
            ValueError: an epoch is not made of whole steps.
        """
        per_step, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
        if per_step == 1 or trainer.fast_dev_run or batches == float("inf"):  # pyright: ignore[reportAttributeAccessIssue]
            return
        if batches % per_step:
            below = int(batches - batches % per_step)
            wanted = (
                f"limit_train_batches {below}" if below else f"accumulate_grad_batches of at most {batches}"
            )
            raise ValueError(
                f"the {batches} batches of an epoch are not divisible by accumulate_grad_batches {per_step}, so that its "
                f"last step would have {batches % per_step}: want {wanted}"
            )
        # A share of the epoch: down to the end of a step.
        if isinstance(trainer.val_check_batch, int):
            trainer.val_check_batch = max(per_step, trainer.val_check_batch // per_step * per_step)

    def state_dict(self) -> dict[str, Any]:
        return {"val_check_interval": str(self.val_check_interval)}

    @rank_zero_only
    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        steps, per_step = self.val_check_interval, trainer.accumulate_grad_batches
        if self.state_key in checkpoint.get("callbacks", {}) or per_step == 1 or not isinstance(steps, int):
            return
        before = f"{steps / per_step:g}"
        print(
            f"warning: val_check_interval {steps} counts optimizer steps now; when this run was started it counted batches, "
            f"which made it {before} steps (accumulate_grad_batches {per_step}): --trainer.val_check_interval sets it",
            file=sys.stderr,
        )
