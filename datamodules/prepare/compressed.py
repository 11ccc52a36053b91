"""Opens compressed files so that one cut short is an error and never a shorter corpus."""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from datamodules.errors import DocumentError, optional_module

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_PIECE_BYTES = 1 << 20

BinaryFile = IO[bytes] | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile | io.BufferedReader


def compression_of(path: str | Path) -> str:
    """The suffix of COMPRESSIONS that ends the name, or an empty one."""
    return next((suffix for suffix in COMPRESSIONS if str(path).lower().endswith(suffix)), "")


@contextmanager
def open_compressed(path: str, start: int = 0) -> Iterator[BinaryFile]:
    """The content of a file from byte `start` on, uncompressed as its suffix says.

    Raises:
        DocumentError: within the block, if the file turns out to be damaged or cut short.
    """
    with naming_the_file(path), _open(path) as file:
        if not compression_of(path):
            file.seek(start)
        else:
            # A compressed file cannot be entered in the middle: the content before is read and dropped.
            while start and (passed := len(file.read(min(start, _PIECE_BYTES)))):
                start -= passed
        yield file


def _open(path: str) -> BinaryFile:
    compression = compression_of(path)
    if compression == ".zst":
        library = optional_module("pyarrow", "data", path)
        # It notices that a file was cut short; the readers of the zstandard library do not.
        return io.BufferedReader(library.CompressedInputStream(library.OSFile(path), "zstd"), _PIECE_BYTES)
    readers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return readers.get(compression, open)(path, "rb")


def content_bytes(path: str) -> int:
    """Size of the content of a file; a compressed one is read for it."""
    if not compression_of(path):
        return Path(path).stat().st_size
    size = 0
    with open_compressed(path) as file:
        while piece := file.read(_PIECE_BYTES):
            size += len(piece)
    return size


@contextmanager
def naming_the_file(path: str) -> Iterator[None]:
    """Turns the errors of a damaged file into a DocumentError that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise DocumentError(f"cannot read {path}: {error}") from None
    except OSError as error:
        # bz2 and pyarrow tell of damage by an OSError; those of the system have a number.
        if error.errno is not None:
            raise
        raise DocumentError(f"cannot read {path}: {error}") from None
