"""The string-copying task of the paper as an endless training stream and fixed, hashed evaluation sets."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.base import StreamDataModule
from datamodules.order import Int64Array, derive_key, random_integers
from datamodules.stream import Batch, Rows, Samples, widen
from datamodules.strings import (
    EOS,
    FIRST_LETTER,
    IGNORE_INDEX,
    MAX_LENGTH,
    copy_rows,
    evaluation_rows,
    random_strings,
)


class _CopyRows:
    """What both sets of strings share: ids are indices, and rows need nothing but a wider type."""

    def order(self, indices: Int64Array) -> Int64Array:
        return indices

    def expand(self, rows: Rows) -> Batch:
        return {name: widen(values) for name, values in rows.items()}


class CopyStream(_CopyRows):
    """Fresh strings for ever; strings with the same `id // group_size` have the same length.

    With the global batch as the group no batch holds padding, whatever the range of lengths. Ids that straddle two
    groups are padded on the right with EOS and ignored targets.
    """

    def __init__(self, seed: int, shortest: int, longest: int, alphabet_size: int, group_size: int) -> None:
        self.seed = seed
        self.shortest = shortest
        self.longest = longest
        self.alphabet_size = alphabet_size
        self.group_size = group_size

        self._length_key = derive_key("copy/length", seed)
        self._string_key = derive_key("copy/train", seed)

    def read(self, ids: Int64Array) -> Rows:
        choices = self.longest - self.shortest + 1
        lengths = self.shortest + random_integers(self._length_key, ids // self.group_size, choices)
        width = 2 * int(lengths.max()) + 2
        padded = {
            "tokens": np.full((len(ids), width), EOS, dtype=np.int32),
            "targets": np.full((len(ids), width), IGNORE_INDEX, dtype=np.int32),
        }
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            strings = random_strings(self._string_key, ids[rows], int(length), self.alphabet_size)
            for name, values in copy_rows(strings).items():
                padded[name][rows, : values.shape[1]] = values
        return padded


class CopyEvaluation(_CopyRows):
    """The evaluation set of one length: the same strings for every user, run and training seed."""

    def __init__(self, split: str, length: int, alphabet_size: int) -> None:
        self.split = split
        self.length = length
        self.alphabet_size = alphabet_size

    def read(self, ids: Int64Array) -> Rows:
        return evaluation_rows(self.split, self.length, self.alphabet_size, ids)


class CopyDataModule(StreamDataModule):
    """Copying random strings, with the official tokens and targets (`BOS s SEP s` -> `s EOS`).

    Args:
        batch_size: strings per step over all ranks.
        length: letters per string, or `[shortest, longest]`, from which each batch draws one length.
        vocab_size: the letters and the three special tokens; the paper's 29 means 26 letters.
        val_lengths: lengths of the evaluation sets, one loader each; the longest training length by default.
        val_samples: strings in each evaluation set.
        batches_per_epoch: steps that the Trainer calls an epoch; the stream itself has no end.
        num_workers: worker processes; drawing strings is cheap, so none is needed.
        seed: chooses the training strings. Evaluation strings do not depend on it.
    """

    def __init__(
        self,
        batch_size: int = 64,
        length: int | list[int] = 16,
        vocab_size: int = 29,
        val_lengths: list[int] | None = None,
        val_samples: int = 256,
        batches_per_epoch: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.save_hyperparameters(logger=False)
        bounds = [length, length] if isinstance(length, int) else length
        if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] < MAX_LENGTH:
            raise ValueError(f"length must be a number of letters or [shortest, longest], got {length}")
        if vocab_size <= FIRST_LETTER:
            raise ValueError(
                f"vocab_size counts the letters and {FIRST_LETTER} special tokens, so it must be at least "
                f"{FIRST_LETTER + 1}, got {vocab_size}"
            )
        self.shortest, self.longest = bounds
        self.vocab_size = vocab_size
        self.val_lengths = [self.longest] if val_lengths is None else val_lengths
        self.val_samples = val_samples
        self.seed = seed
        self._batches_per_epoch = batches_per_epoch

    @property
    def alphabet_size(self) -> int:
        return self.vocab_size - FIRST_LETTER

    @property
    def val_names(self) -> list[str]:
        return [f"length_{length}" for length in self.val_lengths]

    @property
    def max_tokens(self) -> int:
        """Positions of the longest row, training or evaluation."""
        return 2 * max(self.longest, *self.val_lengths) + 2

    def identity(self) -> dict[str, Any]:
        return {
            "task": "copy",
            "seed": self.seed,
            "lengths": [self.shortest, self.longest],
            "alphabet_size": self.alphabet_size,
            # Strings that share their length are those of one batch, so with a range of lengths the size matters.
            "group_size": self.batch_size if self.shortest < self.longest else 1,
        }

    def train_samples(self) -> CopyStream:
        return CopyStream(
            self.seed, self.shortest, self.longest, self.alphabet_size, self.identity()["group_size"]
        )

    def batches_per_epoch(self) -> int:
        return self._batches_per_epoch

    def eval_samples(self, split: str) -> Sequence[tuple[Samples, int]]:
        return [
            (CopyEvaluation(split, length, self.alphabet_size), self.val_samples)
            for length in self.val_lengths
        ]
