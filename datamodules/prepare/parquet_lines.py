"""Reads WikiText as the Hugging Face hub stores it, one line per row of parquet files, as the bytes of the raw file."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datamodules.errors import DocumentError
from datamodules.prepare.parquet import open_parquet, parquet_texts

# The hub's copy strips the lines that hold nothing; in the raw files these are a space and a line feed.
BLANK_LINE = b" \n"
# The hub's names of the splits, where they differ from those of the raw files.
HUB_NAMES = {"valid": "validation"}


def parquet_parts(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order: `train-00000-of-00002.parquet` and so on."""
    return sorted(folder.glob(f"{HUB_NAMES.get(split, split)}*.parquet"))


@contextmanager
def open_lines(paths: list[Path]) -> Iterator[io.BufferedReader]:
    """The lines of the files as one binary file; memory holds a few rows."""
    yield io.BufferedReader(_Lines(paths))


class _Lines(io.RawIOBase):
    def __init__(self, paths: list[Path]) -> None:
        self.pieces = _pieces(paths)
        self.left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self.left:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.left = memoryview(piece)
        count = min(len(buffer), len(self.left))
        buffer[:count] = self.left[:count]
        self.left = self.left[count:]
        return count


def _pieces(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        groups = open_parquet(str(path)).num_row_groups
        for name, line in parquet_texts(str(path), 0, groups, "text"):
            if not isinstance(line, bytes):
                raise DocumentError(f"{name}: wanted a line of text, got {line!r}")
            yield line or BLANK_LINE
