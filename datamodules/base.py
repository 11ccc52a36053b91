"""The base of every DataModule: it says what its data is, makes loaders, and keeps a state that survives a change of machines."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import lightning

from datamodules.ranges import check_range
from datamodules.stream import FixedLoader, Position, Rank, Rows, Samples, StreamLoader


class StreamDataModule(lightning.LightningDataModule, ABC):
    """Training reads an endless stream by global index; evaluation reads fixed sets.

    The state in a checkpoint is the next global sample index and a description of the data that gives the index
    its meaning. It holds no rank and no worker, so a run resumes on any number of either and sees the samples that
    it would have seen. `batch_size` counts samples per step over all ranks, which keeps the optimisation the same
    when their number changes; it must be divisible by that number.

    Subclasses set the fixed sets and the stream, and say what their data is: `kind`, `vocab_size` and `max_length` are
    known as soon as the object is made, so that a config states these once and links them to the network.

    Attributes:
        kind: "text", natural text, which has no one right answer, or "task", whose every answer is right or wrong.
        vocab_size: number of token ids.
    """

    kind: Literal["text", "task"]
    vocab_size: int

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        check_range(self, "[1, inf)", batch_size=batch_size)
        check_range(self, "[0, inf)", num_workers=num_workers)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.position = Position()

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Tokens of the longest row in training and in the evaluation sets; `length_loader` may ask for longer ones."""

    @abstractmethod
    def describe_tokenizer(self) -> dict[str, Any]:
        """Plain values that tell what tokens stand for.

        Either those of `tokenizers.from_description`, or {"kind": "letters", "alphabet_size": N} for the letters of the
        copy task, or {"kind": "numbers", "vocab_size": V} for tokens that stand for nothing else. A task knows them at
        once; text reads them from the manifest of its shards, which `prepare_data` may first have to make or copy.
        """

    @property
    @abstractmethod
    def val_names(self) -> list[str]:
        """Names of the validation sets, in the order of their loaders."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values that, when changed, would make a saved index point at other samples."""

    @abstractmethod
    def train_samples(self) -> Samples: ...

    @abstractmethod
    def batches_per_epoch(self) -> int: ...

    @abstractmethod
    def eval_samples(self, split: str) -> Sequence[tuple[Samples, int]]:
        """The fixed sets of a split, each with its number of samples."""

    @property
    @abstractmethod
    def training_lengths(self) -> tuple[int, int]:
        """The shortest and the longest sequence of training, in the unit that lengths of this data are given in."""

    @abstractmethod
    def positions(self, length: int) -> int:
        """Tokens in a row of this length."""

    @abstractmethod
    def length_samples(self, split: str, length: int) -> tuple[Samples, int | None]:
        """The fixed set of a split at any length, and how many samples it has (None: without end).

        Raises:
            ValueError: there are no samples of this length.
        """

    def length_loader(self, length: int, size: int, rows_per_rank: int) -> FixedLoader:
        """The first `size` validation samples of any length, `rows_per_rank` at a time on each rank.

        Raises:
            ValueError: there are no samples of this length.
        """
        samples, available = self.length_samples("val", length)
        rank = self._rank()
        size = size if available is None else min(size, available)
        batch_size = rows_per_rank * rank.world_size
        return FixedLoader(samples=samples, size=size, batch_size=batch_size, rank=rank, on_rows=self.on_rows)

    def on_rows(self, rows: Rows) -> None:
        """Called in the training process with what was read for each batch, before it becomes a batch."""

    def train_dataloader(self) -> StreamLoader:
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if overfit:
            raise ValueError(
                f"overfit_batches is {overfit}: training reads an endless stream and never sees a batch again within an "
                "epoch; prepare a small corpus instead"
            )
        return StreamLoader(
            samples=self.train_samples(),
            position=self.position,
            batch_size=self.batch_size,
            batches_per_epoch=self.batches_per_pass(),
            rank=self._rank(),
            num_workers=self.num_workers,
            on_rows=self.on_rows,
        )

    def batches_per_pass(self) -> int:
        """Batches of an epoch, rounded up to whole optimizer steps.

        At the end of an epoch the Trainer steps with what it has accumulated, which would be a fifth of a step where five
        batches make a step and a small corpus has one batch. The stream itself has no end, so more batches do no harm.
        """
        per_step = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return math.ceil(self.batches_per_epoch() / per_step) * per_step

    def val_dataloader(self) -> list[FixedLoader]:
        return self._fixed_loaders("val")

    def test_dataloader(self) -> list[FixedLoader]:
        return self._fixed_loaders("test")

    def state_dict(self) -> dict[str, Any]:
        return {**self.identity(), "next_index": self.position.index - self._unfinished_samples()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_identity(state_dict)
        self.position.index = state_dict["next_index"]

    def check_identity(self, state_dict: dict[str, Any]) -> None:
        """Refuses the state of a run on other data.

        Raises:
            ValueError: naming what differs.
        """
        for key, here in self.identity().items():
            if state_dict.get(key) != here:
                raise ValueError(
                    f"the checkpoint was trained on other data and cannot continue on this: {key} was "
                    f"{_short(state_dict.get(key))} and is {_short(here)}"
                )

    def _fixed_loaders(self, split: str) -> list[FixedLoader]:
        return [
            FixedLoader(
                samples=samples,
                size=size,
                batch_size=self.batch_size,
                rank=self._rank(),
                num_workers=self.num_workers,
                on_rows=self.on_rows,
            )
            for samples, size in self.eval_samples(split)
        ]

    def _unfinished_samples(self) -> int:
        """Samples handed out to a step that did not end, as when an exception is what saves the checkpoint."""
        if self.trainer is None or not self.trainer.training:
            return 0
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return (batches.ready - batches.processed) * self.batch_size

    def _rank(self) -> Rank:
        # With tensor parallelism several ranks share one part of the batch; Lightning's strategy knows.
        parts = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return Rank(parts["rank"], parts["num_replicas"]) if parts else Rank()


def _short(value: object) -> str:
    """A value for a message of one line; a tokenizer can have megabytes."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
