"""Baselines against independent definitions."""

import collections
import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest

from datamodules.baselines import FILE, baselines, ngram_bits, unigram_entropy
from datamodules.prepare.preparation import prepare
from datamodules.prepare.presets import plan_preset
from datamodules.shards import Manifest, TokenReader

TRAIN = b"the cat sat on the mat and the rat sat on the cat " * 3 + b"banana bandana"
TEST = b"the rat and the banana sat on zebra"


def as_array(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint8)


def slow_witten_bell(train: bytes, test: bytes, order: int) -> float:
    """The recursion of the docstring, a dictionary per context."""
    following: dict[bytes, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for position, byte in enumerate(train):
        for length in range(order):
            padded = b"\0" * length + train
            following[padded[position : position + length]][byte] += 1

    def probability(context: bytes, byte: int) -> float:
        lower = probability(context[1:], byte) if context else 1 / 256
        counts = following.get(context)
        if counts is None:
            return lower
        return (counts[byte] + len(counts) * lower) / (counts.total() + len(counts))

    padded = b"\0" * (order - 1) + test
    bits = [
        -math.log2(probability(padded[i : i + order - 1], padded[i + order - 1])) for i in range(len(test))
    ]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_ngram_model_is_interpolated_witten_bell(order: int) -> None:
    ours = ngram_bits(as_array(TRAIN), as_array(TEST), order)
    assert ours == pytest.approx(slow_witten_bell(TRAIN, TEST, order), rel=1e-12)


def test_probabilities_of_all_bytes_after_a_context_add_up_to_one() -> None:
    total = 0.0
    for byte in range(256):
        extended = as_array(b"the " + bytes([byte]))
        shorter = as_array(b"the ")
        bits = ngram_bits(as_array(TRAIN), extended, 5) * 5 - ngram_bits(as_array(TRAIN), shorter, 5) * 4
        total += 2**-bits
    assert total == pytest.approx(1, rel=1e-9)


def test_the_entropy_of_known_frequencies() -> None:
    assert unigram_entropy(as_array(b"aabb" * 5)) == 1
    assert unigram_entropy(as_array(b"aaab")) == pytest.approx(2 - 0.75 * math.log2(3))


@pytest.mark.slow
def test_the_shipped_corpus(tmp_path: Path) -> None:
    prepare(plan_preset("state_of_the_union", {"kind": "bytes"}), tmp_path)
    measured = baselines(tmp_path, 30_000)
    manifest = Manifest.load(tmp_path)
    tokens = np.empty(30_000, dtype=np.uint8)
    TokenReader(tmp_path, manifest, "val").read_into(tokens, 0)
    assert measured["xz"] == len(lzma.compress(tokens.tobytes(), preset=9 | lzma.PRESET_EXTREME)) * 8 / 30_000
    assert measured["5-gram"] < measured["xz"] < measured["unigram_entropy"]
    # Kept beside the manifest: a changed file is what the next call answers with.
    kept = json.loads((tmp_path / FILE).read_text())
    (key,) = kept
    kept[key]["xz"] = 7.0
    (tmp_path / FILE).write_text(json.dumps(kept))
    assert baselines(tmp_path, 30_000)["xz"] == 7.0
