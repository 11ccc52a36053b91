"""The string-copying task of the paper."""

import string
from typing import Any

import numpy as np

from datamodules.order import Int64Array, derive_key, random_integers, random_subset
from datamodules.ranges import check_range
from datamodules.tasks.module import TaskDataModule
from datamodules.tasks.strings import FIRST_LETTER, Rows, copy_rows, counters, random_strings
from datamodules.tasks.task import StringTask, Task


class Copy(StringTask):
    """Say a random string again, with the official tokens: `BOS s SEP` is answered by `s EOS`.

    >>> tokens, targets = Copy(alphabet_size=4).example(length=3, index=1)
    >>> tokens
    [0, 6, 3, 5, 1, 6, 3, 5]
    >>> targets
    [-100, -100, -100, -100, 6, 3, 5, 2]
    """

    name = "copy"

    def describe_tokenizer(self) -> dict[str, Any]:
        if self.alphabet_size > len(string.ascii_lowercase):
            return super().describe_tokenizer()
        return {"kind": "letters", "alphabet_size": self.alphabet_size}

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        return copy_rows(random_strings(key, ids, length, self.alphabet_size))


class RepetitiveCopy(Copy):
    """Copying whose training strings repeat themselves: each has a few of the letters, drawn for it alone.

    Only one random string of 64 letters in nine repeats a 3-gram, so training never needs to compare longer contexts.
    Strings of thousands of letters do need it. The same is done for the end of the string: its last n letters (n is drawn)
    are copied to an earlier place, so EOS too needs a long comparison. Evaluated as `Copy`, on strings of all letters.

    >>> RepetitiveCopy(alphabet_size=26).example(length=8)[0]
    [0, 7, 5, 20, 9, 3, 7, 5, 20, 1, 7, 5, 20, 9, 3, 7, 5, 20]

    Args:
        alphabet_size: number of letters in all.
        fewest_letters: of the least varied strings.
        longest_ending: at most this many of the last letters are written over a place before them.

    Raises:
        ValueError: fewer than one letter, or more than there are; an ending of less than none.
    """

    name = "repetitive_copy"

    def __init__(self, alphabet_size: int = 26, fewest_letters: int = 4, longest_ending: int = 6) -> None:
        super().__init__(alphabet_size)
        check_range(self, f"[1, {alphabet_size}]", fewest_letters=fewest_letters)
        check_range(self, "[0, inf)", longest_ending=longest_ending)
        self.fewest_letters = fewest_letters
        self.longest_ending = longest_ending

    def settings(self) -> dict[str, int]:
        return {
            **super().settings(),
            "fewest_letters": self.fewest_letters,
            "longest_ending": self.longest_ending,
        }

    def evaluated_as(self) -> Task:
        return Copy(self.alphabet_size)

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        choices = self.alphabet_size - self.fewest_letters + 1
        sizes = self.fewest_letters + random_integers(derive_key(int(key), "sizes"), ids, choices)[:, None]
        subsets = random_subset(
            derive_key(int(key), "letters"), counters(ids, self.alphabet_size), self.alphabet_size
        )
        strings = np.take_along_axis(subsets, random_integers(key, counters(ids, length), sizes), axis=1)
        return copy_rows(FIRST_LETTER + self.repeat_ending(strings, key, ids))

    def repeat_ending(self, strings: Int64Array, key: np.uint64, ids: Int64Array) -> Int64Array:
        """Writes the last letters of each string, 0 to `longest_ending` of them, over a place before them."""
        length = strings.shape[1]
        # A letter at least stands between the two, which tells the place from the end.
        longest = min(self.longest_ending, (length - 1) // 2)
        letters = random_integers(derive_key(int(key), "endings"), ids, longest + 1)
        places = random_integers(derive_key(int(key), "places"), ids, length - 2 * letters)
        letters, offsets = letters[:, None], np.arange(length) - places[:, None]
        sources = np.where(
            (offsets >= 0) & (offsets < letters), length - letters + offsets, np.arange(length)
        )
        return np.take_along_axis(strings, sources, axis=1)


class CopyDataModule(TaskDataModule):
    """Copying random strings, with the official tokens and targets (`BOS s SEP s` -> `s EOS`).

    Args:
        length: letters per string, or `[shortest, longest]`, from which each batch draws one length.
        vocab_size: the letters and the three special tokens; the paper's 29 means 26 letters.
        settings: as of `TaskDataModule`: val_lengths, batch_size, val_samples, batches_per_epoch, num_workers, seed.
    """

    def __init__(self, length: int | list[int] = 16, vocab_size: int = 29, **settings: Any) -> None:
        if vocab_size <= FIRST_LETTER:
            raise ValueError(
                f"vocab_size counts the letters and {FIRST_LETTER} special tokens, so it must be at least "
                f"{FIRST_LETTER + 1}, got {vocab_size}"
            )
        super().__init__(Copy(vocab_size - FIRST_LETTER), length, **settings)
        self.save_hyperparameters(logger=False)
