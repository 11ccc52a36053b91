"""Strings of the copy task and the rows of tokens and targets made of them, as functions of a key and an index."""

import hashlib

import numpy as np
import numpy.typing as npt

from datamodules.order import Int64Array, derive_key, random_integers

# The target that losses and metrics leave out.
IGNORE_INDEX = -100
# Token ids of the official code; letters follow.
BOS, SEP, EOS = 0, 1, 2
FIRST_LETTER = 3

# Positions of a string are hashed as index * 2**24 + position.
MAX_LENGTH = 1 << 24


def copy_rows(strings: Int64Array) -> dict[str, npt.NDArray[np.int32]]:
    """Rows `BOS s SEP s` and their targets: `s EOS` on the positions from SEP on, ignored before it.

    `strings` (B, S) of token ids gives tokens and targets (B, 2 * S + 2).
    """
    rows, length = strings.shape
    tokens = np.empty((rows, 2 * length + 2), dtype=np.int32)
    tokens[:, 0] = BOS
    tokens[:, 1 : length + 1] = strings
    tokens[:, length + 1] = SEP
    tokens[:, length + 2 :] = strings
    targets = np.full_like(tokens, IGNORE_INDEX)
    targets[:, length + 1 : -1] = strings
    targets[:, -1] = EOS
    return {"tokens": tokens, "targets": targets}


def random_strings(key: np.uint64, ids: Int64Array, length: int, alphabet_size: int) -> Int64Array:
    """Letters (B, S) of the strings with the given ids; a string depends on its key and id only."""
    counters = ids[:, None] * MAX_LENGTH + np.arange(length)
    return FIRST_LETTER + random_integers(key, counters, alphabet_size)


def evaluation_rows(
    split: str, length: int, alphabet_size: int, ids: Int64Array
) -> dict[str, npt.NDArray[np.int32]]:
    """Rows `ids` of the fixed evaluation set of one length, the same for every user, run and training seed."""
    key = derive_key("copy", split, length, alphabet_size)
    return copy_rows(random_strings(key, ids, length, alphabet_size))


def evaluation_sha256(split: str, length: int, alphabet_size: int, samples: int) -> str:
    """Hash of the first token rows of an evaluation set as little-endian int64, by which results are compared."""
    tokens = evaluation_rows(split, length, alphabet_size, np.arange(samples))["tokens"]
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
