"""Recall from the context: key-value pairs, tokens among noise, the token after a trigger."""

from typing import Any

import numpy as np

from datamodules.order import (
    Int64Array,
    derive_key,
    random_integers,
    random_subset,
    random_uniform,
    smallest,
)
from datamodules.ranges import check_range
from datamodules.stream import IGNORE_INDEX
from datamodules.tasks.module import Setting, SyntheticDataModule
from datamodules.tasks.strings import (
    BOS,
    FIRST_LETTER,
    SEP,
    Rows,
    answer_rows,
    counters,
    framed,
    random_strings,
)
from datamodules.tasks.task import StringTask, Task, check_at_least

# The exponent of Zoology's power law; a smaller one puts more queries near the pairs.
_POWER = 0.01
# Zoology's training and test sets (length, pairs). The first of its training sets has 100,000 samples and each of the
# other four 20,000, so it stands here five times.
ZOOLOGY_TRAIN = [[64, 4]] * 5 + [[128, 8], [256, 16], [256, 32], [256, 64]]
ZOOLOGY_VAL = [[64, 4], [64, 8], [64, 16], [128, 32], [256, 64], [512, 128], [1024, 256]]


class AssociativeRecall(Task):
    """Multi-query associative recall as in Zoology (arXiv 2312.04927): each key, when it comes again, gives its value.

    Keys 1 to V/2 - 1 and values V/2 to V - 1, each at most once, stand in pairs at the beginning; then every key
    comes once more, at a distance that follows a power law. Between the queries stand random tokens, or 0.

    >>> task = AssociativeRecall(vocab_size=16, pairs=2, random_filler=False)
    >>> tokens, targets = task.example(length=12, index=3)
    >>> tokens
    [4, 10, 2, 8, 0, 0, 2, 0, 0, 0, 4, 0]
    >>> targets
    [-100, -100, -100, -100, -100, -100, 8, -100, -100, -100, 10, -100]

    Args:
        vocab_size: number of tokens V.
        pairs: number of pairs; a quarter of the length, all that fit, if None.
        random_filler: whether random tokens, or 0, stand between the queries.

    Raises:
        ValueError: a vocabulary too small for keys and values, or no pairs.
    """

    name = "associative_recall"

    def __init__(self, vocab_size: int = 8192, pairs: int | None = None, random_filler: bool = True) -> None:
        # Values must not be the token that ends answers in other tasks.
        check_range(self, "[8, inf)", vocab_size=vocab_size)
        check_range(self, "[1, inf)", pairs=pairs)
        self._vocab_size = vocab_size
        self.pairs = pairs
        self.random_filler = random_filler

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def settings(self) -> dict[str, int]:
        return {
            "vocab_size": self.vocab_size,
            "pairs": self.pairs or 0,
            "random_filler": int(self.random_filler),
        }

    def with_pairs(self, pairs: int) -> "AssociativeRecall":
        """The same task with another number of pairs."""
        return AssociativeRecall(self.vocab_size, pairs, self.random_filler)

    def pairs_at(self, length: int) -> int:
        return length // 4 if self.pairs is None else self.pairs

    def check_length(self, length: int) -> None:
        super().check_length(length)
        pairs = self.pairs_at(length)
        check_at_least(length, 4 * max(pairs, 1), f"4 tokens for each of {max(pairs, 1)} pairs")
        keys = self.vocab_size // 2 - 1
        if pairs > keys:
            raise ValueError(
                f"vocab_size must be at least {2 * pairs + 2} for {pairs} pairs at length {length}, got {self.vocab_size}"
            )

    def positions(self, length: int) -> int:
        return length

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        pairs, half = self.pairs_at(length), self.vocab_size // 2
        part = {name: derive_key(int(key), name) for name in ("filler", "keys", "values", "queries")}
        keys = 1 + random_subset(part["keys"], counters(ids, half - 1), pairs)
        values = half + random_subset(part["values"], counters(ids, self.vocab_size - half), pairs)
        if self.random_filler:
            tokens = random_integers(part["filler"], counters(ids, length), self.vocab_size)
        else:
            tokens = np.zeros((len(ids), length), dtype=np.int64)
        tokens[:, 0 : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = values
        places = 2 * pairs + 2 * self.query_slots(part["queries"], ids, (length - 2 * pairs) // 2, pairs)
        targets = np.full(tokens.shape, IGNORE_INDEX, dtype=np.int32)
        np.put_along_axis(tokens, places, keys, axis=1)
        np.put_along_axis(targets, places, values.astype(np.int32), axis=1)
        return {"tokens": tokens.astype(np.int32), "targets": targets}

    def query_slots(self, key: np.uint64, ids: Int64Array, slots: int, pairs: int) -> Int64Array:
        """The slots (B, pairs) of the queries, drawn one after another without replacement, slot s with s^(power - 1)."""
        weights = np.arange(1, slots + 1) ** (_POWER - 1)
        # Exponential times divided by the weights have the order of such draws (Efraimidis, Spirakis 2006).
        return smallest(-np.log(random_uniform(key, counters(ids, slots))) / weights, pairs)


class RecallDataModule(SyntheticDataModule):
    """Multi-query associative recall on a grid of lengths and numbers of pairs; by default Zoology's published one.

    Each batch draws one entry of the training grid. The length ladder has as many pairs as fit, a quarter of the length.

    Args:
        task: the vocabulary and the filler; the grids give lengths and pairs.
        train_grid: `[length, pairs]` entries; one that stands twice is drawn twice as often.
        val_grid: `[length, pairs]` of the evaluation sets.
        settings: as of `SyntheticDataModule`: batch_size, val_samples, batches_per_epoch, num_workers, seed.

    Raises:
        ValueError: an entry that is no `[length, pairs]`, or more pairs than fit.
    """

    def __init__(
        self,
        task: AssociativeRecall,
        train_grid: list[list[int]] | None = None,
        val_grid: list[list[int]] | None = None,
        **settings: Any,
    ) -> None:
        grids = {
            "train_grid": ZOOLOGY_TRAIN if train_grid is None else train_grid,
            "val_grid": ZOOLOGY_VAL if val_grid is None else val_grid,
        }
        for name, grid in grids.items():
            if not grid or any(len(entry) != 2 for entry in grid):
                raise ValueError(f"{name} must hold [length, pairs] entries, got {grid}")
        train, val = (
            [Setting(task.with_pairs(pairs), length) for length, pairs in grid] for grid in grids.values()
        )
        self.train_grid = grids["train_grid"]
        super().__init__(
            AssociativeRecall(task.vocab_size, None, task.random_filler),
            train,
            {
                f"length_{length}_pairs_{pairs}": entry
                for entry, (length, pairs) in zip(val, grids["val_grid"], strict=True)
            },
            **settings,
        )

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "grid": self.train_grid}


class SelectiveCopying(StringTask):
    """Say the letters that stand among blanks, in their order, without the blanks (arXiv 2312.00752).

    The blank is the last token, here 7:

    >>> tokens, targets = SelectiveCopying(letters=2, alphabet_size=4).example(length=6)
    >>> tokens
    [0, 7, 7, 7, 6, 7, 4, 1, 6, 4]
    >>> targets
    [-100, -100, -100, -100, -100, -100, -100, 6, 4, 2]

    Args:
        letters: letters to say again, at every length.
        alphabet_size: number of different letters.

    Raises:
        ValueError: no letters to say, or an empty alphabet.
    """

    name = "selective_copying"

    def __init__(self, letters: int = 16, alphabet_size: int = 16) -> None:
        super().__init__(alphabet_size)
        check_range(self, "[1, inf)", letters=letters)
        self.letters = letters

    @property
    def vocab_size(self) -> int:
        return super().vocab_size + 1

    def settings(self) -> dict[str, int]:
        return {**super().settings(), "letters": self.letters}

    def check_length(self, length: int) -> None:
        super().check_length(length)
        check_at_least(length, self.letters, f"{self.letters} letters to say again")

    def positions(self, length: int) -> int:
        return 2 + length + self.letters

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        letters = random_strings(key, ids, self.letters, self.alphabet_size)
        places = np.sort(
            random_subset(derive_key(int(key), "places"), counters(ids, length), self.letters), axis=1
        )
        strings = np.full((len(ids), length), FIRST_LETTER + self.alphabet_size)
        np.put_along_axis(strings, places, letters, axis=1)
        return answer_rows(framed(BOS, strings, SEP), letters)


class InductionHeads(StringTask):
    """Say the letter that followed the trigger, SEP, when the trigger comes again at the end (arXiv 2312.00752).

    >>> tokens, targets = InductionHeads(alphabet_size=4).example(length=6)
    >>> tokens
    [0, 3, 6, 1, 3, 3, 5, 1]
    >>> targets
    [-100, -100, -100, -100, -100, -100, -100, 3]
    """

    name = "induction_heads"

    def check_length(self, length: int) -> None:
        super().check_length(length)
        check_at_least(length, 2, "the trigger and the letter after it")

    def positions(self, length: int) -> int:
        return length + 2

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        strings = random_strings(key, ids, length, self.alphabet_size)
        places = random_integers(derive_key(int(key), "place"), ids, length - 1)[:, None]
        answers = np.take_along_axis(strings, places + 1, axis=1)
        np.put_along_axis(strings, places, SEP, axis=1)
        tokens = framed(BOS, strings, SEP)
        targets = np.full_like(tokens, IGNORE_INDEX)
        targets[:, -1:] = answers
        return {"tokens": tokens, "targets": targets}
