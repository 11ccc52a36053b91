"""Puts the number of samples that could not be read into the metrics."""

import lightning
from lightning.pytorch import Callback


class SkippedSamples(Callback):
    """Logs `data/skipped_samples`, summed over the ranks, whenever the Trainer logs.

    A text DataModule with `on_bad_shard: skip` adds it to its Trainer by itself.
    """

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        # Every rank counts its own, and all come here at the same steps, as the reduction needs.
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.global_step % every == 0:
            count = float(trainer.datamodule.skipped_samples)  # pyright: ignore[reportAttributeAccessIssue]
            pl_module.log("data/skipped_samples", count, sync_dist=True, reduce_fx="sum")
