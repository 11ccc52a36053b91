"""Bits per byte of methods that need no network, on the very bytes that a model is validated on."""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.files import write_atomically
from datamodules.order import Int64Array
from datamodules.shards import Manifest, TokenReader
from datamodules.tokenizers import from_description

FILE = "baselines.json"
# Training bytes that the n-gram model counts: sorting them takes a few seconds and a few hundred MB.
_MAX_TRAIN_TOKENS = 1 << 24
_MAX_VAL_TOKENS = 1 << 23


def baselines(
    shards_dir: str | Path, val_tokens: int | None = None, url: str | None = None
) -> dict[str, float]:
    """Bits per byte on the first `val_tokens` tokens of the validation split (all by default, at most 8 Mi).

    - `unigram_entropy`: the entropy of these bytes' own frequencies, the least that any model of single bytes needs.
    - `5-gram`: an interpolated Witten-Bell model of bytes given the four before, counted on the first 16 Mi
      training tokens.
    - `xz`: their size under `xz -9e`, header included. xz starts without knowledge; the other two and a trained
      model do not.

    With a `url`, `shards_dir` holds copies of the shards behind that address, and what is missing is copied.

    The result is kept beside the manifest, and read from there when the same bytes are asked for again.
    """
    folder = Path(shards_dir)
    manifest = Manifest.load(folder)
    size = min(manifest.splits["val"].tokens, val_tokens or _MAX_VAL_TOKENS, _MAX_VAL_TOKENS)
    saved = _load(folder / FILE)
    key = f"{manifest.fingerprint}/{size}"
    if key not in saved:
        train_size = min(manifest.splits["train"].tokens, _MAX_TRAIN_TOKENS)
        val, train = (
            _bytes_of(TokenReader(folder, manifest, split, url), tokens, manifest)
            for split, tokens in (("val", size), ("train", train_size))
        )
        saved[key] = {
            "unigram_entropy": unigram_entropy(val),
            "5-gram": ngram_bits(train, val, order=5),
            "xz": len(lzma.compress(val.tobytes(), preset=9 | lzma.PRESET_EXTREME)) * 8 / len(val),
        }
        write_atomically(folder / FILE, json.dumps(saved, indent=1).encode())
    return saved[key]


def unigram_entropy(data: npt.NDArray[np.uint8]) -> float:
    """Entropy of the byte frequencies of `data` (N,), in bits per byte."""
    frequencies = np.bincount(data) / len(data)
    frequencies = frequencies[frequencies > 0]
    return float(-(frequencies * np.log2(frequencies)).sum())


def ngram_bits(train: npt.NDArray[np.uint8], test: npt.NDArray[np.uint8], order: int) -> float:
    """Bits per byte of `test` (M,) under an interpolated Witten-Bell model of the byte n-grams of `train` (N,).

    p_n(c | h) = (count(hc) + kinds(h) p_{n-1}(c | h')) / (count(h) + kinds(h)), where h' is h without its first
    byte, kinds(h) is the number of different bytes that follow h in `train`, and p_0 is uniform over 256 bytes
    (Witten, Bell 1991). The first `order - 1` bytes of `test` are predicted from a context of NUL bytes.
    """
    probability = np.full(len(test), 1 / 256)
    for length in range(1, order + 1):
        grams, gram_counts = np.unique(_grams(train, length), return_counts=True)
        contexts, first, kinds = np.unique(grams >> 8, return_index=True, return_counts=True)
        context_counts = np.add.reduceat(gram_counts, first)
        wanted = _grams(test, length)
        count = _lookup(grams, gram_counts, wanted)
        context_count = _lookup(contexts, context_counts, wanted >> 8)
        kind = _lookup(contexts, kinds, wanted >> 8)
        # A context never seen says nothing: the shorter one's estimate stands.
        seen = context_count > 0
        interpolated = (count + kind * probability)[seen] / (context_count + kind)[seen]
        probability[seen] = interpolated
    return float(-np.log2(probability).mean())


def _grams(data: npt.NDArray[np.uint8], length: int) -> Int64Array:
    """Each byte with the `length - 1` before it as one number, (N,); NUL bytes stand before the first."""
    padded = np.concatenate([np.zeros(length - 1, dtype=np.uint8), data]).astype(np.int64)
    grams = np.zeros(len(data), dtype=np.int64)
    for offset in range(length):
        grams = grams << 8 | padded[offset : offset + len(data)]
    return grams


def _lookup(keys: Int64Array, values: Int64Array, wanted: Int64Array) -> Int64Array:
    """The value of each wanted key, 0 where it is not among the sorted `keys`."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _bytes_of(reader: TokenReader, size: int, manifest: Manifest) -> npt.NDArray[np.uint8]:
    tokens = np.empty(size, dtype=reader.dtype)
    reader.read_into(tokens, 0)
    return np.frombuffer(from_description(manifest.tokenizer).decode_bytes(tokens), dtype=np.uint8)


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
