"""The string-copying task of the paper."""

import numpy as np

from datamodules.order import Int64Array
from datamodules.strings import FIRST_LETTER, Rows, copy_rows, random_strings
from datamodules.task import StringTask
from datamodules.tasks import TaskDataModule


class Copy(StringTask):
    """Say a random string again, with the official tokens: `BOS s SEP` is answered by `s EOS`.

    >>> tokens, targets = Copy(alphabet_size=4).example(length=3, index=1)
    >>> tokens
    [0, 6, 3, 5, 1, 6, 3, 5]
    >>> targets
    [-100, -100, -100, -100, 6, 3, 5, 2]
    """

    name = "copy"

    def positions(self, length: int) -> int:
        return 2 * length + 2

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        return copy_rows(random_strings(key, ids, length, self.alphabet_size))


class CopyDataModule(TaskDataModule):
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
        if vocab_size <= FIRST_LETTER:
            raise ValueError(
                f"vocab_size counts the letters and {FIRST_LETTER} special tokens, so it must be at least "
                f"{FIRST_LETTER + 1}, got {vocab_size}"
            )
        super().__init__(
            Copy(vocab_size - FIRST_LETTER),
            batch_size=batch_size,
            length=length,
            val_lengths=val_lengths,
            val_samples=val_samples,
            batches_per_epoch=batches_per_epoch,
            num_workers=num_workers,
            seed=seed,
        )
        self.save_hyperparameters(logger=False)
