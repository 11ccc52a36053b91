"""The manifest of a folder of shards, and random access to the tokens that it lists, wherever the shards lie."""

import bisect
import hashlib
import itertools
import json
import os
import re
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.errors import ShardError
from datamodules.fetch import fetch, join_url
from datamodules.files import write_atomically

MANIFEST = "manifest.json"
FORMAT = "causalrn-token-shards"
VERSION = 1

# Tokens of one tar member. A member is the unit of checksums: small enough that checking it on first touch costs
# little more than reading it, large enough that 10 GB need only 160,000 entries in the manifest.
MEMBER_TOKENS = 1 << 16
_FILE_NAME = re.compile(r"[\w-][\w.-]*")


@dataclass(frozen=True)
class Shard:
    """One tar file: `offsets` are where the members' tokens start, in bytes; all but the last member are full."""

    name: str
    tokens: int
    size_bytes: int
    sha256: str
    offsets: list[int]
    crc32: list[int]


@dataclass(frozen=True)
class Split:
    """The shards of one split in order; `text_bytes` counts the UTF-8 bytes that the tokens stand for."""

    documents: int
    text_bytes: int
    tokens: int
    shards: list[Shard]


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards."""

    tokenizer: dict[str, Any]
    vocab_size: int
    dtype: str
    member_tokens: int
    splits: dict[str, Split]
    source: dict[str, Any]
    skipped_documents: int = 0
    empty_documents: int = 0

    def save(self, folder: Path) -> None:
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)
        write_atomically(folder / MANIFEST, text.encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        path = Path(folder) / MANIFEST
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            relative_to = "" if Path(folder).is_absolute() else f" (relative to {Path.cwd()})"
            raise ShardError(
                f"no {MANIFEST} in {folder}{relative_to}: prepare shards with "
                f"`python -m datamodules.prepare text --input FILES --output {folder}`"
            ) from None
        except ValueError as error:
            raise ShardError(f"{path} is not valid JSON: {error}") from None
        found = (
            (values.pop("format", None), values.pop("version", None)) if isinstance(values, dict) else values
        )
        if found != (FORMAT, VERSION):
            raise ShardError(f"{path} is not a manifest of {FORMAT} version {VERSION}: got {found}")
        try:
            splits = {
                name: Split(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
                for name, split in values.pop("splits").items()
            }
            manifest = cls(splits=splits, **values)
        except (KeyError, TypeError) as error:
            raise ShardError(f"{path} is not complete: {error}") from None
        names = [shard.name for split in manifest.splits.values() for shard in split.shards]
        if wrong := [name for name in names if not _FILE_NAME.fullmatch(name)]:
            # The name becomes part of an address and of a path.
            raise ShardError(f"{path} lists a shard {wrong[0]!r}: wanted the name of a file beside it")
        return manifest

    @property
    def fingerprint(self) -> str:
        """Hash of every token and of the tokenizer: equal for equal data wherever it lies."""
        digest = hashlib.sha256(json.dumps(self.tokenizer, sort_keys=True).encode())
        for name, split in sorted(self.splits.items()):
            digest.update(name.encode())
            for shard in split.shards:
                digest.update(shard.sha256.encode())
        return digest.hexdigest()


def fetch_manifest(url: str, folder: Path) -> None:
    """Copies the manifest of the shards behind an address into a folder.

    The address is asked each time, because the corpus may have changed. Where it does not answer, an earlier copy will do.

    Raises:
        ShardError: the address cannot be read, and there is no earlier copy.
    """
    path = folder / MANIFEST
    try:
        fetch(join_url(url, MANIFEST), path)
    except ShardError as error:
        if not path.exists():
            raise
        warnings.warn(f"{error}; the copy in {folder} is used", stacklevel=2)


class TokenReader:
    """Random access to the tokens of one split by their number in the stream of all its shards.

    With a `url` the shards lie behind that address, and `folder` holds copies of those that were read.

    Reads by position (pread) rather than through a memory map, so that a file cut short while it is in use gives an
    error instead of killing the process. A member's checksum is compared when the process first touches it.
    Survives being sent to a worker process: open files stay behind.
    """

    # A process may usually have 1024 open files.
    _MAX_OPEN = 256

    def __init__(self, folder: str | Path, manifest: Manifest, split: str, url: str | None = None) -> None:
        self._files: dict[int, int] = {}
        self.folder = Path(folder)
        self.url = url
        self.shards = manifest.splits[split].shards
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.member_tokens = manifest.member_tokens
        # These are lists, because a lookup in a numpy array would cost as much as reading a block.
        self._ends = list(itertools.accumulate(shard.tokens for shard in self.shards))
        self._checked = [bytearray(len(shard.offsets)) for shard in self.shards]
        self.tokens = self._ends[-1] if self._ends else 0
        self._item_bytes = self.dtype.itemsize

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def read_into(self, out: npt.NDArray[Any], start: int) -> None:
        """Fills `out` (N,), of the shards' dtype, with tokens `start` to `start + N`.

        Raises:
            ShardError: if a shard is missing, shorter than the manifest says, or damaged.
        """
        left = out.data
        shard_index = bisect.bisect_right(self._ends, start)
        while len(left):
            shard = self.shards[shard_index]
            first = start - self._ends[shard_index] + shard.tokens
            member, within = divmod(first, self.member_tokens)
            size = min(len(left), self.member_tokens - within, shard.tokens - first)
            if not self._checked[shard_index][member]:
                self._check(shard_index, member)
            self._pread(shard_index, left[:size], shard.offsets[member] + within * self._item_bytes)
            left = left[size:]
            start += size
            if first + size == shard.tokens:
                shard_index += 1

    def _check(self, shard_index: int, member: int) -> None:
        shard = self.shards[shard_index]
        size = min(self.member_tokens, shard.tokens - member * self.member_tokens)
        data = np.empty(size, dtype=self.dtype)
        self._pread(shard_index, data.data, shard.offsets[member])
        if zlib.crc32(data.data) != shard.crc32[member]:
            raise ShardError(
                f"shard {self._place(shard_index)} is damaged: member {member} at byte {shard.offsets[member]} "
                f"does not have the checksum that {MANIFEST} lists"
            )
        self._checked[shard_index][member] = 1

    def _pread(self, shard_index: int, out: memoryview, offset: int) -> None:
        file = self._files.get(shard_index)
        if file is None:
            file = self._open(shard_index)
        try:
            read_bytes = os.preadv(file, (out,), offset)
        except OSError as error:
            raise ShardError(f"cannot read shard {self._path(shard_index)}: {error.strerror}") from None
        if read_bytes != out.nbytes:
            shard = self.shards[shard_index]
            raise ShardError(
                f"shard {self._place(shard_index)} is truncated: it ends before byte {offset + out.nbytes}, and "
                f"{MANIFEST} lists {shard.size_bytes} bytes"
            )

    def _open(self, shard_index: int) -> int:
        if len(self._files) == self._MAX_OPEN:
            oldest = next(iter(self._files))
            os.close(self._files.pop(oldest))
        if self.url is not None:
            shard = self.shards[shard_index]
            url = join_url(self.url, shard.name)
            fetch(url, self._path(shard_index), sha256=shard.sha256, size_bytes=shard.size_bytes)
        try:
            file = os.open(self._path(shard_index), os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"cannot read shard {self._path(shard_index)}: {error.strerror}") from None
        self._files[shard_index] = file
        return file

    def _path(self, shard_index: int) -> Path:
        return self.folder / self.shards[shard_index].name

    def _place(self, shard_index: int) -> str:
        """The place of a shard for messages: a damaged copy must be found to be deleted."""
        path = self._path(shard_index)
        return f"{path} (copy of {join_url(self.url, path.name)})" if self.url is not None else str(path)
