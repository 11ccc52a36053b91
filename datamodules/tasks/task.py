"""A synthetic task is one object that makes the sample with a given index at any length, and does nothing else."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from datamodules.order import Int64Array, derive_key
from datamodules.ranges import check_range
from datamodules.tasks.strings import FIRST_LETTER, MAX_LENGTH, Rows


class Task(ABC):
    """Makes rows of tokens and targets; every row of one length has the same number of positions.

    A sample is a function of (key, id, length) alone, so that streams resume exactly and evaluation sets are the
    same for everybody. `check_length` tells which lengths the task's arguments allow.
    """

    # Goes into keys and checkpoints: a change makes other evaluation sets.
    name: str

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @abstractmethod
    def settings(self) -> dict[str, int]:
        """The arguments, which with key, id and length make a sample."""

    @abstractmethod
    def positions(self, length: int) -> int:
        """Tokens in a row of this length."""

    @abstractmethod
    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        """The samples `ids` (B,) at one length: int32 tokens and targets (B, positions)."""

    def check_length(self, length: int) -> None:
        """Raises a ValueError that says why there are no samples of this length."""
        if not 1 <= length < MAX_LENGTH:
            raise ValueError(f"length must be in [1, {MAX_LENGTH}), got {length}")

    def describe_tokenizer(self) -> dict[str, Any]:
        """Tells what tokens stand for, in the form of `StreamDataModule.describe_tokenizer`."""
        return {"kind": "numbers", "vocab_size": self.vocab_size}

    def evaluated_as(self) -> "Task":
        """The task of the evaluation sets, which differs where only training samples are drawn in a special way."""
        return self

    def evaluation_key(self, split: str, length: int) -> np.uint64:
        """The key of the fixed set of one split and length, the same for every run and training seed."""
        return derive_key(self.name, split, length, *self.settings().values())

    def example(self, length: int, index: int = 0) -> tuple[list[int], list[int]]:
        """Tokens and targets of one validation sample, to look at."""
        self.check_length(length)
        rows = self.rows(self.evaluation_key("val", length), np.array([index]), length)
        return rows["tokens"][0].tolist(), rows["targets"][0].tolist()


class StringTask(Task):
    """A task on strings of letters, whose ids follow those of BOS, SEP and EOS.

    A row is `BOS string SEP answer` with an answer as long as the string, unless a task says otherwise.

    Args:
        alphabet_size: number of letters.

    Raises:
        ValueError: too few letters.
    """

    def __init__(self, alphabet_size: int = 26) -> None:
        check_range(self, "[1, inf)", alphabet_size=alphabet_size)
        self.alphabet_size = alphabet_size

    @property
    def vocab_size(self) -> int:
        return FIRST_LETTER + self.alphabet_size

    def settings(self) -> dict[str, int]:
        return {"alphabet_size": self.alphabet_size}

    def positions(self, length: int) -> int:
        return 2 * length + 2


def check_at_least(length: int, shortest: int, why: str) -> None:
    """Raises a ValueError for a length that has no room for what a task puts into it."""
    if length < shortest:
        raise ValueError(f"length must be at least {shortest} ({why}), got {length}")
