"""Opens compressed files so that one cut short is an error and never a shorter corpus."""

import gzip
import io
import lzma
from typing import IO, Any

from datamodules.errors import optional_module

# A compressed piece this small cannot expand to more than a few tens of MB even in a hostile file.
_ZSTANDARD_READ_BYTES = 1 << 14


def open_compressed(path: str) -> IO[bytes] | gzip.GzipFile | io.BufferedReader:
    """The content of a file, uncompressed as its suffix says: .gz, .xz, .zst or anything else as it is."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".xz"):
        return lzma.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstandardFile(path), 1 << 20)
    return open(path, "rb")


class _ZstandardFile(io.RawIOBase):
    """The content of a .zst file of any number of frames.

    The library's own file object takes a file that was cut short for one that ends there.
    """

    def __init__(self, path: str) -> None:
        self._library = optional_module("zstandard", path)
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
