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
from typing import IO, Any

from datamodules.errors import DocumentError, optional_module

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
_PASSED_BYTES = 1 << 20

BinaryFile = IO[bytes] | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile | io.BufferedReader
# A compressed piece this small cannot expand to more than a few tens of MB even in a hostile file.
_ZSTANDARD_READ_BYTES = 1 << 14


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
            # What lies before can only be read.
            while start and (passed := len(file.read(min(start, _PASSED_BYTES)))):
                start -= passed
        yield file


def _open(path: str) -> BinaryFile:
    compression = compression_of(path)
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        return io.BufferedReader(_ZstandardFile(path), 1 << 20)
    if compression == ".xz":
        return lzma.open(path, "rb")
    return bz2.open(path, "rb") if compression == ".bz2" else open(path, "rb")


def content_bytes(path: str) -> int:
    """Size of the content of a file; a compressed one is read for it."""
    if not compression_of(path):
        return Path(path).stat().st_size
    size = 0
    with open_compressed(path) as file:
        while piece := file.read(_PASSED_BYTES):
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
        # bz2 tells of damage by an OSError; those of the system have a number.
        if error.errno is not None:
            raise
        raise DocumentError(f"cannot read {path}: {error}") from None


class _ZstandardFile(io.RawIOBase):
    """The content of a .zst file of any number of frames.

    The library's own file object takes a file that was cut short for one that ends there.
    """

    def __init__(self, path: str) -> None:
        self._library = optional_module("zstandard", "data", str(path))
        self._file = io.FileIO(path)
        self._frame: Any = None
        self._waiting = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            compressed = self._waiting or self._file.read(_ZSTANDARD_READ_BYTES)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._content = memoryview(self._frame.decompress(compressed))
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from None
            self._waiting = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
