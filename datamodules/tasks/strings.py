"""Strings of the copy task and the rows of tokens and targets made of them, as functions of a key and an index."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.order import Int64Array, derive_key, random_integers
from datamodules.stream import IGNORE_INDEX

# Tokens and targets of one batch, (B, T) each.
Rows = dict[str, npt.NDArray[np.int32]]

# Token ids of the official code; letters follow.
BOS, SEP, EOS = 0, 1, 2
FIRST_LETTER = 3

# A position of a string is hashed as index * 2**24 + position.
MAX_LENGTH = 1 << 24


def answer_rows(prompts: npt.NDArray[Any], answers: npt.NDArray[Any]) -> Rows:
    """Rows of a prompt (B, P) and its answer (B, N), and their targets: the answer, then EOS, from the prompt's end on.

    Gives tokens and targets (B, P + N) of int32; what a position predicts is the token after it.
    """
    tokens = np.concatenate([prompts, answers], axis=1, dtype=np.int32)
    targets = np.full_like(tokens, IGNORE_INDEX)
    targets[:, prompts.shape[1] - 1 : -1] = answers
    targets[:, -1] = EOS
    return {"tokens": tokens, "targets": targets}


def framed(*parts: int | npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Prompts (B, P) of the parts in their order; a number stands for one column of that token."""
    rows = next(len(part) for part in parts if not isinstance(part, int))
    columns = [np.full((rows, 1), part) if isinstance(part, int) else part for part in parts]
    return np.concatenate(columns, axis=1, dtype=np.int32)


def copy_rows(strings: Int64Array) -> Rows:
    """Rows `BOS s SEP s` and their targets: `s EOS` on the positions from SEP on, ignored before it.

    `strings` (B, S) of token ids gives tokens and targets (B, 2 * S + 2).
    """
    return answer_rows(framed(BOS, strings, SEP), strings)


def random_strings(key: np.uint64, ids: Int64Array, length: int, alphabet_size: int) -> Int64Array:
    """Letters (B, S) of the strings with the given ids; a string depends on its key and id only."""
    return FIRST_LETTER + random_integers(key, counters(ids, length), alphabet_size)


def counters(ids: Int64Array, length: int) -> Int64Array:
    """A number (B, S) for each position of each sample, different from all others, to draw random numbers with."""
    return ids[:, None] * MAX_LENGTH + np.arange(length)


def evaluation_rows(split: str, length: int, alphabet_size: int, ids: Int64Array) -> Rows:
    """Rows `ids` of the fixed evaluation set of one length, the same for every user, run and training seed."""
    key = derive_key("copy", split, length, alphabet_size)
    return copy_rows(random_strings(key, ids, length, alphabet_size))


def evaluation_sha256(split: str, length: int, alphabet_size: int, samples: int) -> str:
    """Hash of the first token rows of an evaluation set as little-endian int64, by which results are compared."""
    tokens = evaluation_rows(split, length, alphabet_size, np.arange(samples))["tokens"]
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
