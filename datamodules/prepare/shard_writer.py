"""Writes shards: plain WebDataset tar files of .npy members that appear whole or not at all."""

import contextlib
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from datamodules.errors import ShardError
from datamodules.files import replacing
from datamodules.shards import MEMBER_TOKENS, Shard

_TAR_BLOCK = 512


class ShardWriter:
    """Writes tokens into one shard, under a temporary name until `close`.

    Equal tokens give equal bytes: no time, owner or permission of this machine is stored.

    Raises:
        ShardError: the system refuses the write, as on a full disk; the temporary file is removed.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.tokens = 0
        self.size_bytes = 0
        self.offsets: list[int] = []
        self.crc32: list[int] = []
        self._sha256 = hashlib.sha256()
        self._open = contextlib.ExitStack()
        with self._naming_the_shard():
            temporary = self._open.enter_context(replacing(path))
            self._file = self._open.enter_context(temporary.open("wb"))

    def write_member(self, tokens: npt.NDArray[Any]) -> None:
        """Appends one member; only the last may hold fewer than MEMBER_TOKENS tokens."""
        tokens = np.ascontiguousarray(tokens, dtype=self.dtype)
        data = tokens.data.cast("B")
        npy = io.BytesIO()
        description = {"descr": tokens.dtype.str, "fortran_order": False, "shape": tokens.shape}
        np.lib.format.write_array_header_1_0(npy, description)
        info = tarfile.TarInfo(f"{self.path.stem}-{len(self.offsets):06d}.npy")
        info.size = npy.tell() + len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT) + npy.getvalue())
        self.offsets.append(self.size_bytes)
        self.crc32.append(zlib.crc32(data))
        self.tokens += len(tokens)
        self._write(data)
        self._write(bytes(-info.size % _TAR_BLOCK))

    def close(self) -> Shard:
        """Ends the archive and gives it its name."""
        self._write(bytes(2 * _TAR_BLOCK))
        with self._naming_the_shard():
            self._open.close()
        sha256 = self._sha256.hexdigest()
        return Shard(self.path.name, self.tokens, self.size_bytes, sha256, self.offsets, self.crc32)

    def discard(self) -> None:
        """Removes what was written."""
        # An exception tells `replacing` to give up. Closing flushes, which fails again where the disk is full.
        with contextlib.suppress(OSError), self._open:
            raise InterruptedError

    def _write(self, data: bytes | memoryview) -> None:
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


class SplitWriter:
    """Packs a stream of tokens into members and members into shards `{prefix}-{number}.tar`.

    As a context it ends the last shard, or removes it where an exception comes.
    """

    def __init__(self, folder: Path, prefix: str, dtype: str, shard_tokens: int) -> None:
        self.folder = folder
        self.prefix = prefix
        self.dtype = dtype
        self.shard_members = max(1, shard_tokens // MEMBER_TOKENS)
        self.shards: list[Shard] = []
        self._buffer = np.empty(MEMBER_TOKENS, dtype=dtype)
        self._filled = 0
        self._writer: ShardWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None and self._filled:
            self._end_member()
        if self._writer is not None:
            self._end_shard() if kind is None else self._writer.discard()

    def write(self, tokens: npt.NDArray[Any]) -> None:
        while len(tokens):
            size = min(len(tokens), MEMBER_TOKENS - self._filled)
            self._buffer[self._filled : self._filled + size] = tokens[:size]
            tokens = tokens[size:]
            self._filled += size
            if self._filled == MEMBER_TOKENS:
                self._end_member()

    def _end_member(self) -> None:
        if self._writer is None:
            self._writer = ShardWriter(self.folder / f"{self.prefix}-{len(self.shards):03d}.tar", self.dtype)
        self._writer.write_member(self._buffer[: self._filled])
        self._filled = 0
        if len(self._writer.offsets) == self.shard_members:
            self._end_shard()

    def _end_shard(self) -> None:
        assert self._writer is not None
        self.shards.append(self._writer.close())
        self._writer = None
