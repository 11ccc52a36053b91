"""Relatives of copying: strings said backwards, strings that repeat themselves, and lookup of what follows an n-gram."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from datamodules.order import Int64Array, derive_key, random_subset, random_uniform
from datamodules.ranges import check_range
from datamodules.tasks.strings import BOS, SEP, Rows, answer_rows, copy_rows, counters, framed, random_strings
from datamodules.tasks.task import StringTask, check_at_least

# A string in which no n-gram occurs just once is drawn anew so often. A draw fails far less than half the time.
_ATTEMPTS = 100


class Reverse(StringTask):
    """Say a random string backwards.

    >>> tokens, targets = Reverse(alphabet_size=4).example(length=3)
    >>> tokens
    [0, 3, 6, 4, 1, 4, 6, 3]
    >>> targets
    [-100, -100, -100, -100, 4, 6, 3, 2]
    """

    name = "reverse"

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        strings = random_strings(key, ids, length, self.alphabet_size)
        return answer_rows(framed(BOS, strings, SEP), strings[:, ::-1])


class DuplicatedNgrams(StringTask):
    """Copy a string in which one n-gram stands twice, so that what follows it is ambiguous (arXiv 2402.01032).

    The n-gram is written over another one, that does not overlap it, of an otherwise random string. Here 7 5 stands twice:

    >>> tokens, targets = DuplicatedNgrams(n_gram=2, alphabet_size=8).example(length=6, index=6)
    >>> tokens
    [0, 4, 8, 7, 5, 7, 5, 1, 4, 8, 7, 5, 7, 5]
    >>> targets
    [-100, -100, -100, -100, -100, -100, -100, 4, 8, 7, 5, 7, 5, 2]

    Args:
        n_gram: letters of the n-gram.
        alphabet_size: number of letters.

    Raises:
        ValueError: an n-gram without letters, or an empty alphabet.
    """

    name = "duplicated_ngrams"

    def __init__(self, n_gram: int = 4, alphabet_size: int = 26) -> None:
        super().__init__(alphabet_size)
        check_range(self, "[1, inf)", n_gram=n_gram)
        self.n_gram = n_gram

    def settings(self) -> dict[str, int]:
        return {**super().settings(), "n_gram": self.n_gram}

    def check_length(self, length: int) -> None:
        super().check_length(length)
        check_at_least(length, 2 * self.n_gram, f"two n-grams of {self.n_gram} letters")

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        strings = random_strings(key, ids, length, self.alphabet_size)
        # Two starts that are n or more apart are two different numbers of a range that is n - 1 shorter.
        starts = counters(ids, length - 2 * self.n_gram + 2)
        places = np.sort(random_subset(derive_key(int(key), "places"), starts, 2), axis=1)
        letters = np.arange(self.n_gram)
        first = np.take_along_axis(strings, places[:, :1] + letters, axis=1)
        np.put_along_axis(strings, places[:, 1:] + self.n_gram - 1 + letters, first, axis=1)
        return copy_rows(strings)


class _Lookup(NamedTuple):
    """Strings (B, S), an n-gram (B, n) that occurs once in each, and the letters (B, a) after it."""

    strings: Int64Array
    ngrams: Int64Array
    answers: Int64Array


class NgramLookup(StringTask):
    """Base of the two lookups: a string, an n-gram that occurs once in it, and the letters after it as the answer.

    Args:
        n_gram: letters of the n-gram that is looked up.
        answer_length: letters of the answer.
        alphabet_size: number of letters.

    Raises:
        ValueError: no letters to look up or to answer, or more n-grams than 2**62.
    """

    def __init__(self, n_gram: int = 3, answer_length: int = 8, alphabet_size: int = 26) -> None:
        super().__init__(alphabet_size)
        check_range(self, "[1, inf)", n_gram=n_gram, answer_length=answer_length)
        if alphabet_size**n_gram > 1 << 62:
            raise ValueError(
                f"alphabet_size ** n_gram must be at most 2**62, got alphabet_size={alphabet_size}, n_gram={n_gram}"
            )
        self.n_gram = n_gram
        self.answer_length = answer_length

    def settings(self) -> dict[str, int]:
        return {**super().settings(), "n_gram": self.n_gram, "answer_length": self.answer_length}

    def check_length(self, length: int) -> None:
        super().check_length(length)
        shortest = self.n_gram + self.answer_length
        check_at_least(
            length, shortest, f"{self.n_gram} letters to look up and {self.answer_length} to answer"
        )
        ngrams = self.alphabet_size**self.n_gram
        if length > ngrams:
            raise ValueError(
                f"length must be at most {ngrams}, the number of {self.n_gram}-grams of {self.alphabet_size} letters, "
                f"or too few occur only once: got {length}"
            )

    def lookups(self, key: np.uint64, ids: Int64Array, length: int) -> _Lookup:
        strings = np.empty((len(ids), length), dtype=np.int64)
        starts = np.empty((len(ids), 1), dtype=np.int64)
        waiting = np.arange(len(ids))
        for attempt in range(_ATTEMPTS):
            drawn = random_strings(derive_key(int(key), attempt), ids[waiting], length, self.alphabet_size)
            once = occurs_once(drawn, self.n_gram)[:, : length - self.n_gram - self.answer_length + 1]
            chosen = random_uniform(derive_key(int(key), "start", attempt), ids[waiting]) * once.sum(1)
            strings[waiting] = drawn
            # The n-gram with `chosen`, rounded down, others before it that occur once too.
            starts[waiting, 0] = (once.cumsum(1) > chosen[:, None]).argmax(1)
            waiting = waiting[~once.any(1)]
            if not waiting.size:
                break
        else:
            raise ValueError(
                f"found no string of {length} letters with a {self.n_gram}-gram that occurs once in {_ATTEMPTS} draws; "
                "want shorter strings, a larger alphabet_size or a larger n_gram"
            )
        ends = starts + self.n_gram
        ngrams = np.take_along_axis(strings, starts + np.arange(self.n_gram), axis=1)
        answers = np.take_along_axis(strings, ends + np.arange(self.answer_length), axis=1)
        return _Lookup(strings, ngrams, answers)

    def positions(self, length: int) -> int:
        return 2 + length + self.n_gram + self.answer_length


class PrefixLookup(NgramLookup):
    """Given an n-gram and then a string, say the letters that follow the n-gram in it (prefix key, arXiv 2402.01032).

    In `BOS n-gram SEP string SEP` 6 5 is looked up, and 3 is what follows it:

    >>> tokens, targets = PrefixLookup(n_gram=2, answer_length=1, alphabet_size=4).example(length=6, index=2)
    >>> tokens
    [0, 6, 5, 1, 6, 6, 5, 3, 5, 5, 1, 3]
    >>> targets
    [-100, -100, -100, -100, -100, -100, -100, -100, -100, -100, 3, 2]
    """

    name = "prefix_lookup"

    def positions(self, length: int) -> int:
        return super().positions(length) + 1

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        lookup = self.lookups(key, ids, length)
        return answer_rows(framed(BOS, lookup.ngrams, SEP, lookup.strings, SEP), lookup.answers)


class SuffixLookup(NgramLookup):
    """Given a string and then an n-gram, say the letters that follow the n-gram in it (suffix key, arXiv 2402.01032).

    In `BOS string SEP n-gram` 4 5 is looked up, and 6 is what follows it:

    >>> tokens, targets = SuffixLookup(n_gram=2, answer_length=1, alphabet_size=4).example(length=6)
    >>> tokens
    [0, 4, 5, 6, 4, 6, 5, 1, 4, 5, 6]
    >>> targets
    [-100, -100, -100, -100, -100, -100, -100, -100, -100, 6, 2]
    """

    name = "suffix_lookup"

    def rows(self, key: np.uint64, ids: Int64Array, length: int) -> Rows:
        lookup = self.lookups(key, ids, length)
        return answer_rows(framed(BOS, lookup.strings, SEP, lookup.ngrams), lookup.answers)


def occurs_once(strings: Int64Array, n_gram: int) -> npt.NDArray[np.bool_]:
    """Whether the n-gram that starts at each place of each string (B, S) stands nowhere else in it, (B, S - n + 1)."""
    letters = strings - strings.min()
    base = int(letters.max()) + 1
    places = strings.shape[1] - n_gram + 1
    codes = np.zeros((len(strings), places), dtype=np.int64)
    for offset in range(n_gram):
        codes = codes * base + letters[:, offset : offset + places]
    order = np.argsort(codes, axis=1)
    ordered = np.take_along_axis(codes, order, axis=1)
    new = np.ones((len(strings), places + 1), dtype=bool)
    new[:, 1:-1] = ordered[:, 1:] != ordered[:, :-1]
    once = np.empty(codes.shape, dtype=bool)
    np.put_along_axis(once, order, new[:, :-1] & new[:, 1:], axis=1)
    return once
