"""Writes the fixed evaluation sets of the copy task as WebDataset shards, for other tools and other users."""

import json
from pathlib import Path

import numpy as np

from datamodules.files import write_atomically
from datamodules.prepare.shard_writer import TarWriter, npy_header
from datamodules.ranges import check_range
from datamodules.shards import MANIFEST, ShardError
from datamodules.tasks.strings import FIRST_LETTER, evaluation_rows, evaluation_sha256

FORMAT = "causalrn-copy-shards"
VERSION = 1
_SPLITS = ("val", "test")


def prepare_copy(output: str | Path, *, lengths: list[int], samples: int, vocab_size: int) -> str:
    """One shard `{split}-length_{S}.tar` per split and length, and a manifest with the hash of each set.

    A sample holds `tokens.npy` and `targets.npy`, int64 of 2 * S + 2, and equals what `CopyDataModule` validates or
    tests on. Returns a line per set for people.

    Raises:
        ShardError: if `output` holds something else already.
        ValueError: a vocabulary without letters.
    """
    check_range(None, f"[{FIRST_LETTER + 1}, inf)", vocab_size=vocab_size)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ShardError(f"{folder} is not empty")
    alphabet_size = vocab_size - FIRST_LETTER
    sets = []
    for split in _SPLITS:
        for length in lengths:
            tar = TarWriter(folder / f"{split}-length_{length}.tar")
            rows = evaluation_rows(split, length, alphabet_size, np.arange(samples))
            for number in range(samples):
                for name in ("tokens", "targets"):
                    row = rows[name][number].astype("<i8")
                    tar.add(f"{number:06d}.{name}.npy", npy_header(row), row.tobytes())
            sets.append(
                {
                    "name": tar.path.name,
                    "split": split,
                    "length": length,
                    "samples": samples,
                    "tokens_sha256": evaluation_sha256(split, length, alphabet_size, samples),
                    "sha256": tar.close(),
                }
            )
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "task": "copy",
        "vocab_size": vocab_size,
        "dtype": "int64",
        "sets": sets,
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return "\n".join(f"{entry['name']:<24} {entry['tokens_sha256']}" for entry in sets)
