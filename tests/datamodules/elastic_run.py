"""One segment of a training run on some number of ranks, recording the samples that each step was given.

Every rank writes `{record}-{rank}.jsonl`, one line per micro-step.
"""

import json
import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from datamodules.text import TextDataModule

# Each block of the test corpus is the decimal number of the block.
BLOCK_TOKENS = 8


class Recorder(lightning.LightningModule):
    """Learns nothing worth having and writes down the numbers of the blocks it saw."""

    def __init__(self, record: str | None) -> None:
        super().__init__()
        self.record = record
        self.weight = torch.nn.Parameter(torch.zeros(256))

    def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        ids = [int(bytes(row.tolist())) for row in batch["tokens"]]
        if self.record is not None:
            with Path(f"{self.record}-{self.global_rank}.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.global_step, "ids": ids}) + "\n")
        return self.weight[batch["tokens"]].square().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> None:
        self.log("val/rows", float(len(batch["tokens"])), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(settings: dict[str, Any], module: type[Recorder] = Recorder) -> None:
    """Trains as the settings say; see `Runs.segment` of the tests."""
    ranks = settings["ranks"]
    data = TextDataModule(
        settings["shards"],
        BLOCK_TOKENS,
        batch_size=settings["batch_size"],
        num_workers=settings["workers"],
        seed=7,
    )
    # Saves from within the step, as a callback that answers a signal would.
    callbacks: list[Callback] = [
        ModelCheckpoint(
            settings["checkpoints"],
            every_n_train_steps=settings.get("save_every", 1),
            filename="{step}",
            save_top_k=-1,
        )
    ]
    if "save_on_exception" in settings:
        rescued = Path(settings["save_on_exception"])
        callbacks.append(OnExceptionCheckpoint(rescued.parent, rescued.stem))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        max_steps=settings["max_steps"],
        max_epochs=-1,
        accumulate_grad_batches=settings["accumulate"],
        limit_val_batches=1,
        num_sanity_val_steps=0,
        limit_train_batches=settings.get("limit_train_batches"),
        overfit_batches=settings.get("overfit_batches", 0),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module(settings["record"]), datamodule=data, ckpt_path=settings.get("resume"))


def run_alone(settings: dict[str, Any], environment: dict[str, str]) -> None:
    """A segment in a process of its own."""
    os.environ.update(environment)
    # The loader's workers are forks, as in a process that was not started by a fork server.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run(settings)
