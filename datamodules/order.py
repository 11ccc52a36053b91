"""Counter-based randomness: hashes and permutations that are functions of (seed, epoch, index) and hold no state."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
# Increment and multipliers of splitmix64 (Steele, Lea, Flood 2014; the variant 13 mixer of Stafford).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Four rounds make a Feistel network pseudorandom for ideal round functions (Luby, Rackoff 1988); the doubled
# number costs about a microsecond per batch and serves the tiny domains, whose halves have only a few bits.
_ROUNDS = 8
# A permutation of so few samples is computed once for all of them. Where few samples lie in one large run, walking over
# what lies outside takes hundreds of steps, which are look-ups then.
_MAX_TABLE = 1 << 16


def mix(values: UInt64Array) -> UInt64Array:
    """The splitmix64 finaliser: a bijection of 64-bit words in which each input bit flips half of the output."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: int | str) -> np.uint64:
    """One 64-bit key out of seeds, epochs and names; the same parts give the same key on every machine."""
    key = 0
    for part in parts:
        words = part.encode() if isinstance(part, str) else (part & _MASK).to_bytes(8, "little")
        for start in range(0, len(words), 8):
            word = int.from_bytes(words[start : start + 8], "little")
            key = int(mix(np.array([(key * 3 + word) & _MASK], dtype=np.uint64))[0])
    return np.uint64(key)


def random_integers(key: np.uint64, counters: npt.ArrayLike, upper: int | Int64Array) -> Int64Array:
    """Integers in [0, upper), one per counter, shape of `counters`; bias below upper / 2**32.

    `upper` is one for all or one for each, broadcast to the counters.
    """
    words = mix(np.asarray(counters, dtype=np.uint64) ^ key)
    return ((words >> np.uint64(32)) * np.asarray(upper, dtype=np.uint64) >> np.uint64(32)).astype(np.int64)


def random_uniform(key: np.uint64, counters: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Numbers in (0, 1), one per counter, shape of `counters`."""
    words = mix(np.asarray(counters, dtype=np.uint64) ^ key)
    # 53 bits are what a float64 holds; the half keeps 0 out.
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) / (1 << 53)


def random_subset(key: np.uint64, counters: Int64Array, size: int) -> Int64Array:
    """For each row of `counters` (B, N), `size` different numbers of range(N) in random order, (B, size)."""
    words = mix(counters.astype(np.uint64) ^ key)
    return smallest(words, size)


def smallest(values: npt.NDArray[Any], size: int) -> Int64Array:
    """The places (B, size) of the smallest values of each row (B, N), the smallest first."""
    places = np.argpartition(values, size - 1, axis=1)[:, :size]
    chosen = np.take_along_axis(values, places, axis=1)
    return np.take_along_axis(places, np.argsort(chosen, axis=1), axis=1)


class Permutation:
    """A pseudorandom permutation of range(size) in constant memory: a Feistel network with cycle walking.

    The network permutes the smallest power of two that holds `size`; values that fall outside are sent through
    again until they land inside (Black, Rogaway 2002), fewer than two passes on average.

    Raises:
        ValueError: if `size` is not in [1, 2**62].
    """

    def __init__(self, size: int, *key: int | str) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation needs a size in [1, 2**62], got {size}")
        self.size = size
        bits = max((size - 1).bit_length(), 2)
        self._right_bits = bits // 2
        self._left_bits = bits - self._right_bits
        self._keys = [derive_key(*key, round_) for round_ in range(_ROUNDS)]

    def __call__(self, indices: npt.ArrayLike) -> Int64Array:
        """The images of `indices`, each in [0, size); shape of `indices`."""
        return _walk(self._network, np.asarray(indices).astype(np.uint64), self.size).astype(np.int64)

    def _network(self, values: UInt64Array) -> UInt64Array:
        # The halves swap their widths every round, so that an odd number of bits needs no padding bit.
        left_bits, right_bits = self._left_bits, self._right_bits
        for key in self._keys:
            left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
            left = (left ^ mix(right ^ key)) & np.uint64((1 << left_bits) - 1)
            values = (right << np.uint64(left_bits)) | left
            left_bits, right_bits = right_bits, left_bits
        return values


class LocalPermutation:
    """A permutation of range(size) in constant memory whose neighbours lie in few places of the corpus.

    Runs of `group` consecutive samples are permuted over the whole corpus, and then all samples of each window of
    `window` such runs are permuted among themselves. A reader thus works on `window` places at a time and reads each
    of them whole, whatever the size of the corpus; what fits into one window is shuffled uniformly.
    """

    def __init__(self, size: int, group: int, window: int, *key: int | str) -> None:
        self.size = size
        self.group = group
        groups = (size + group - 1) // group
        window = min(window, groups)
        self.window_samples = group * window
        # The last run is filled up to a whole one; samples beyond the end are walked over like those of a network.
        self._domain = groups * group
        self._window = window
        self._key = key
        self._groups = Permutation(groups, *key, "groups")

    def __call__(self, indices: npt.ArrayLike) -> Int64Array:
        """The images of `indices`, each in [0, size); shape of `indices`."""
        permute = self._table.__getitem__ if self._domain <= _MAX_TABLE else self._permute
        return _walk(permute, np.asarray(indices, dtype=np.int64), self.size)

    @functools.cached_property
    def _table(self) -> Int64Array:
        return self._permute(np.arange(self._domain))

    def _permute(self, indices: Int64Array) -> Int64Array:
        windows, offsets = np.divmod(indices, self.window_samples)
        places = np.empty_like(offsets)
        for window in np.unique(windows):
            chosen = windows == window
            size = min(self.window_samples, self._domain - int(window) * self.window_samples)
            places[chosen] = _window_permutation(size, *self._key, "window", int(window))(offsets[chosen])
        slots, within = np.divmod(places, self.group)
        return self._groups(windows * self._window + slots) * self.group + within


def _walk(permute: Callable[[Any], Any], values: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Images below `size` under a permutation of a larger range: what falls outside is sent through again."""
    values = permute(values)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = permute(values[outside])
        outside = outside[values[outside] >= size]
    return values


_window_permutation = functools.lru_cache(maxsize=8)(Permutation)
_epoch_permutation = functools.lru_cache(maxsize=4)(LocalPermutation)


def shuffled(
    size: int, seed: int, indices: Int64Array, *, group: int = 1, window: int = 1 << 62
) -> Int64Array:
    """Samples at the global `indices` (N,) of an endless stream that visits range(size) once per epoch.

    Index i lies in epoch i // size; each epoch has a permutation of its own (`LocalPermutation`, uniform by
    default). The result depends on nothing but the arguments, so any rank or worker computes any part of the order.
    """
    epochs, offsets = np.divmod(indices, size)
    samples = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        samples[chosen] = _epoch_permutation(size, group, window, "epoch", seed, int(epoch))(offsets[chosen])
    return samples
