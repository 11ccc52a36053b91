"""The order of samples: permutations that need no memory, and hashes that are the same everywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import order
from datamodules.order import LocalPermutation, Permutation, derive_key, mix, random_integers, shuffled

GOLDEN_ORDER = [250, 830, 406, 640, 491, 785]
GOLDEN_KEY = 6010145522495862035


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_every_size_is_permuted(size: int, seed: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, seed)(np.arange(size))), np.arange(size))


@pytest.mark.slow
@given(
    size=st.integers(1, 1000), group=st.integers(1, 80), window=st.integers(1, 40), seed=st.integers(0, 2**63)
)
@settings(max_examples=60, deadline=None)
def test_every_size_is_permuted_locally(size: int, group: int, window: int, seed: int) -> None:
    images = LocalPermutation(size, group, window, seed)(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_a_window_visits_few_places_and_all_of_each() -> None:
    # 10^13 samples in runs of 64, 1024 runs at a time: a window of a corpus far beyond any memory.
    permutation = LocalPermutation(10**13, 64, 1024, "local")
    for first in (0, 64 * 1024 * 10**7):
        window = permutation(np.arange(first, first + 64 * 1024))
        places, counts = np.unique(window // 64, return_counts=True)
        assert len(places) == 1024
        assert (counts == 64).all()
        # Places lie all over the corpus, and neighbours in the order seldom in one place.
        assert places.max() - places.min() > 0.99 * 10**13 / 64
        assert (np.diff(window // 64) == 0).mean() < 0.003


def test_what_fits_into_a_window_is_shuffled_as_a_whole() -> None:
    images = LocalPermutation(64 * 100, 64, 1024, "small")(np.arange(6400))
    # Of 6399 pairs of neighbours 64 / 6400 lie in one run by chance: 64, with a standard deviation of 8.
    assert (np.diff(images // 64) == 0).sum() < 64 + 5 * 8


def test_a_table_gives_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def images() -> np.ndarray:
        return LocalPermutation(500, 256, 1024, "table")(np.arange(500))

    with_table = images()
    monkeypatch.setattr(order, "_MAX_TABLE", 0)
    assert np.array_equal(images(), with_table)


def test_a_huge_permutation_is_injective_and_within_bounds() -> None:
    size = 10**15 + 37
    indices = np.concatenate([np.arange(2000), size - 1 - np.arange(2000)])
    images = Permutation(size, "huge")(indices)
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == len(images)


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"got {size}"):
        Permutation(size)


def test_images_are_spread_evenly_and_independent_of_their_neighbours() -> None:
    # Chi-square over 64 x 64 cells of (image of i, image of i + 1): 4095 degrees of freedom have the standard
    # deviation sqrt(2 * 4095) = 90, so five of them are 450.
    size = 1 << 18
    images = Permutation(size - 5, "spread")(np.arange(size - 5)) * 64 // size
    counts = np.bincount(images[:-1] * 64 + images[1:], minlength=4096)
    expected = counts.mean()
    assert abs(((counts - expected) ** 2 / expected).sum() - 4095) < 450


def test_the_same_seed_gives_the_same_order_on_every_machine() -> None:
    # A change of these numbers would silently change the order of every run that is resumed.
    assert shuffled(1000, 3, np.array([0, 1, 2, 999, 1000, 2500])).tolist() == GOLDEN_ORDER
    assert int(derive_key("copy/train", 0)) == GOLDEN_KEY


def test_epochs_are_different_permutations() -> None:
    epochs = shuffled(100, 0, np.arange(300)).reshape(3, 100)
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(shuffled(100, 1, np.arange(100)), epochs[0])


def test_any_part_of_the_order_can_be_computed_alone() -> None:
    whole = shuffled(77, 5, np.arange(500))
    for start in range(0, 500, 61):
        assert np.array_equal(
            shuffled(77, 5, np.arange(start, min(start + 61, 500))), whole[start : start + 61]
        )


def test_mix_flips_half_of_the_bits() -> None:
    words = np.arange(4096, dtype=np.uint64)
    flipped = mix(words) ^ mix(words ^ np.uint64(1))
    bits = np.unpackbits(flipped.view(np.uint8)).mean()
    # 262,144 bits: the standard deviation of their mean is 0.001.
    assert abs(bits - 0.5) < 0.005


def test_random_integers_are_uniform() -> None:
    counts = np.bincount(random_integers(derive_key(1), np.arange(26000), 26), minlength=26)
    # 25 degrees of freedom: 60 is exceeded once in 10,000 keys, and this key is fixed.
    assert ((counts - 1000) ** 2 / 1000).sum() < 60
