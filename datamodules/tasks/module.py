"""The DataModule of every synthetic task: an endless training stream and fixed evaluation sets of any length."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from datamodules.base import StreamDataModule
from datamodules.order import Int64Array, derive_key, random_integers
from datamodules.ranges import check_range
from datamodules.stream import IGNORE_INDEX, Batch, Rows, Samples, widen
from datamodules.tasks.strings import EOS
from datamodules.tasks.task import Task


class Setting(NamedTuple):
    """A task at one length."""

    task: Task
    length: int


class _TaskRows:
    """Base of streams and evaluation sets: ids are indices, and rows need nothing but a wider type."""

    def order(self, indices: Int64Array) -> Int64Array:
        return indices

    def expand(self, rows: Rows) -> Batch:
        return {"tokens": widen(rows["tokens"]), "targets": widen(rows["targets"])}


class TaskStream(_TaskRows):
    """Fresh samples for ever; those with the same `id // group_size` share one of the settings, drawn at random.

    With the global batch as the group no batch holds padding, whatever the lengths. Ids that straddle two groups are
    padded on the right with EOS and ignored targets.
    """

    def __init__(self, seed: int, settings: Sequence[Setting], group_size: int) -> None:
        self.settings = settings
        self.group_size = group_size
        name = settings[0].task.name
        self._length_key = derive_key(f"{name}/length", seed)
        self._sample_key = derive_key(f"{name}/train", seed)

    def read(self, ids: Int64Array) -> Rows:
        choices = random_integers(self._length_key, ids // self.group_size, len(self.settings))
        width = max(task.positions(length) for task, length in (self.settings[i] for i in np.unique(choices)))
        padded = {
            "tokens": np.full((len(ids), width), EOS, dtype=np.int32),
            "targets": np.full((len(ids), width), IGNORE_INDEX, dtype=np.int32),
        }
        for choice in np.unique(choices):
            rows = np.flatnonzero(choices == choice)
            task, length = self.settings[choice]
            for name, values in task.rows(self._sample_key, ids[rows], length).items():
                padded[name][rows, : values.shape[1]] = values
        return padded


class TaskEvaluation(_TaskRows):
    """The evaluation set of one setting: the same samples for every user, run and training seed."""

    def __init__(self, split: str, setting: Setting) -> None:
        self.setting = setting
        self._key = setting.task.evaluation_key(split, setting.length)

    def read(self, ids: Int64Array) -> Rows:
        return self.setting.task.rows(self._key, ids, self.setting.length)


class SyntheticDataModule(StreamDataModule):
    """A stream over a few settings of a task, of which each batch draws one, and named evaluation sets.

    Args:
        task: what the length ladder evaluates; the training and evaluation settings are variants of it.
        train: settings from which each batch draws one.
        val: evaluation sets by name, one loader each.
        batch_size: samples per step over all ranks.
        val_samples: samples in each evaluation set.
        batches_per_epoch: steps that the Trainer calls an epoch; the stream itself has no end.
        num_workers: worker processes; drawing samples is cheap, so none is needed.
        seed: chooses the training samples. Evaluation samples do not depend on it.
    """

    kind = "task"

    def __init__(
        self,
        task: Task,
        train: Sequence[Setting],
        val: dict[str, Setting],
        batch_size: int = 64,
        val_samples: int = 256,
        batches_per_epoch: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        for variant, length in (*train, *val.values()):
            variant.check_length(length)
        check_range(self, "[1, inf)", val_samples=val_samples, batches_per_epoch=batches_per_epoch)
        self.task = task
        self.train_settings = train
        self.val_settings = val
        self.val_samples = val_samples
        self.seed = seed
        self.vocab_size = task.vocab_size
        self._batches_per_epoch = batches_per_epoch

    def describe_tokenizer(self) -> dict[str, Any]:
        return self.task.describe_tokenizer()

    @property
    def val_names(self) -> list[str]:
        return list(self.val_settings)

    @property
    def training_lengths(self) -> tuple[int, int]:
        lengths = [setting.length for setting in self.train_settings]
        return min(lengths), max(lengths)

    @property
    def max_length(self) -> int:
        settings = (*self.train_settings, *self.val_settings.values())
        return max(task.positions(length) for task, length in settings)

    def identity(self) -> dict[str, Any]:
        task = self.train_settings[0].task
        return {
            "task": task.name,
            "seed": self.seed,
            "lengths": list(self.training_lengths),
            **task.settings(),
            # Samples that share their setting are those of one batch, so with several of them the size matters.
            "group_size": self.batch_size if len(self.train_settings) > 1 else 1,
        }

    def train_samples(self) -> TaskStream:
        return TaskStream(self.seed, self.train_settings, self.identity()["group_size"])

    def batches_per_epoch(self) -> int:
        return self._batches_per_epoch

    def eval_samples(self, split: str) -> Sequence[tuple[Samples, int]]:
        return [(TaskEvaluation(split, setting), self.val_samples) for setting in self.val_settings.values()]

    def positions(self, length: int) -> int:
        return self.task.positions(length)

    def length_samples(self, split: str, length: int) -> tuple[Samples, int | None]:
        self.task.check_length(length)
        return TaskEvaluation(split, Setting(self.task, length)), None


class TaskDataModule(SyntheticDataModule):
    """Any task of this package, at one length or a range of them.

    Args:
        task: makes the samples.
        length: of the samples, in the task's unit, or `[shortest, longest]`, from which each batch draws one.
        val_lengths: lengths of the evaluation sets, one loader each; the longest training length by default.
        settings: as of `SyntheticDataModule`: batch_size, val_samples, batches_per_epoch, num_workers, seed.

    Raises:
        ValueError: settings that are impossible, or lengths that the task has no samples of.
    """

    def __init__(
        self,
        task: Task,
        length: int | list[int] = 64,
        val_lengths: list[int] | None = None,
        **settings: Any,
    ) -> None:
        shortest, longest = length_range(task, length)
        if val_lengths is not None and not val_lengths:
            raise ValueError(
                "val_lengths is empty: want at least one length, or null for the longest in training"
            )
        lengths = [longest] if val_lengths is None else val_lengths
        evaluated = task.evaluated_as()
        super().__init__(
            evaluated,
            [Setting(task, length) for length in range(shortest, longest + 1)],
            {f"length_{length}": Setting(evaluated, length) for length in lengths},
            **settings,
        )


def length_range(task: Task, length: int | list[int]) -> tuple[int, int]:
    """The shortest and the longest of the training lengths.

    Raises:
        ValueError: no length and no range of two, or lengths that the task has no samples of.
    """
    bounds = [length, length] if isinstance(length, int) else length
    if len(bounds) != 2 or bounds[0] > bounds[1]:
        raise ValueError(f"length must be a number or [shortest, longest], got {length}")
    for bound in bounds:
        task.check_length(bound)
    return bounds[0], bounds[1]
