"""Writes shards: plain WebDataset tar files that appear whole or not at all."""

import contextlib
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from datamodules.shards import Shard, ShardError

_TAR_BLOCK = 512


class TarWriter:
    """Writes a plain tar file under a temporary name, hashing it; `close` renames it.

    Equal members give equal bytes: no time, owner or permission of this machine is stored.

    Raises:
        ShardError: where the system refuses the write, as on a full disk; the temporary file is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # With the process in the name, a process left over from a killed preparation cannot write into ours.
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.size_bytes = 0
        self._sha256 = hashlib.sha256()
        self._file: IO[bytes] | None = None
        with self._naming_the_shard():
            self._file = self.temporary.open("wb")

    def add(self, name: str, header: bytes, data: memoryview | bytes) -> int:
        """Appends a member of `header` and `data`; returns the offset of `data` in the file, in bytes."""
        info = tarfile.TarInfo(name)
        info.size = len(header) + len(data)
        prefix = info.tobuf(tarfile.USTAR_FORMAT) + header
        offset = self.size_bytes + len(prefix)
        self._write(prefix)
        self._write(data)
        self._write(bytes(-info.size % _TAR_BLOCK))
        return offset

    def close(self) -> str:
        """Ends the archive and gives it its name; returns its sha256."""
        assert self._file is not None
        self._write(bytes(2 * _TAR_BLOCK))
        with self._naming_the_shard():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.temporary, self.path)
        return self._sha256.hexdigest()

    def discard(self) -> None:
        self.temporary.unlink(missing_ok=True)
        if self._file is not None:
            # Closing flushes, which fails again where the disk is full; the descriptor is released all the same.
            with contextlib.suppress(OSError):
                self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        with self._naming_the_shard():
            self._file.write(data)
        self._sha256.update(data)
        self.size_bytes += len(data)

    @contextlib.contextmanager
    def _naming_the_shard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            raise ShardError(f"cannot write shard {self.path}: {error.strerror}") from None


def npy_header(array: npt.NDArray[Any]) -> bytes:
    """What precedes the bytes of a C-contiguous array in a .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    )
    return header.getvalue()


class ShardWriter:
    """Writes tokens into one shard of .npy members."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.tokens = 0
        self._tar = TarWriter(path)
        self._offsets: list[int] = []
        self._crc32: list[int] = []

    def write_member(self, tokens: npt.NDArray[Any]) -> None:
        """Appends one member; only the last may hold fewer than MEMBER_TOKENS tokens."""
        tokens = np.ascontiguousarray(tokens, dtype=self.dtype)
        data = tokens.data.cast("B")
        name = f"{self._tar.path.stem}-{len(self._offsets):06d}.npy"
        self._offsets.append(self._tar.add(name, npy_header(tokens), data))
        self._crc32.append(zlib.crc32(data))
        self.tokens += len(tokens)

    def close(self) -> Shard:
        sha256 = self._tar.close()
        return Shard(
            name=self._tar.path.name,
            tokens=self.tokens,
            size_bytes=self._tar.size_bytes,
            sha256=sha256,
            offsets=self._offsets,
            crc32=self._crc32,
        )

    def discard(self) -> None:
        self._tar.discard()
