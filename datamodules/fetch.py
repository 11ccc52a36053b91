"""Copies files from http(s), s3 and pipe addresses into a local cache, from which they are read like any other file."""

import contextlib
import hashlib
import os
import re
import select
import shlex
from collections.abc import Generator
from pathlib import Path
from typing import Any

from datamodules.errors import ShardError
from datamodules.files import Lock, replacing

_PIECE_BYTES = 1 << 20
# A sender that is silent for so long is given up.
_SILENCE_SECONDS = 60.0
# webdataset reads http(s) by curl, which asks a busy server again; these are the meanings of its exit status.
_CURL_FAULTS = {
    6: "there is no such host",
    7: "nothing answers there",
    18: "the answer was cut short",
    22: "the server refused it or has no such file",
    28: "the server did not answer in time",
    56: "the connection broke",
}


def is_address(location: str) -> bool:
    """Whether shards lie behind an address (`https://...`, `s3://...`, `pipe:COMMAND`) and not in a folder."""
    return re.match(r"pipe:|[a-z][a-z0-9+.-]*://", location) is not None


def join_url(base: str, name: str) -> str:
    """The address of a file below a base; a base with `{}` is a template, as in `pipe:aws s3 cp s3://b/{} -`."""
    return base.replace("{}", name) if "{}" in base else f"{base.rstrip('/')}/{name}"


def cache_folder() -> Path:
    """The folder of copies: $CAUSALRN_CACHE, or causalrn in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache"
    return Path(os.environ.get("CAUSALRN_CACHE", "") or Path(base) / "causalrn")


def copies_folder(url: str, cache_dir: str | None = None) -> Path:
    """The folder for copies of what lies behind an address: one for each address, so that two corpora never mix."""
    base = cache_folder() / "remote" if cache_dir is None else Path(cache_dir)
    return base / hashlib.sha256(url.encode()).hexdigest()[:16]


def fetch(url: str, path: Path, *, sha256: str | None = None, size_bytes: int | None = None) -> None:
    """Copies what an address holds into a file, which appears whole or not at all.

    A copy that is there and has `size_bytes` is taken as it is; one of another size is that of an older corpus. Processes
    that want the same copy wait for the first of them.

    Raises:
        ShardError: the address cannot be read to its end, it holds something else, or the copy cannot be written.
    """

    def is_there() -> bool:
        return size_bytes is not None and path.exists() and path.stat().st_size == size_bytes

    if is_there():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_name(f".{path.name}.lock"), f"the copy {path}", wait=True):
            if is_there():
                return
            # Only a process that was killed leaves one behind, because this one holds the lock.
            for left_over in path.parent.glob(f"{path.name}.*.tmp"):
                left_over.unlink()
            digest = hashlib.sha256()
            with (
                replacing(path) as temporary,
                temporary.open("wb") as file,
                contextlib.closing(_pieces(url)) as pieces,
            ):
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
                if sha256 not in (None, digest.hexdigest()):
                    raise ShardError(
                        f"{url} is truncated or damaged: its sha256 is {digest.hexdigest()}, wanted {sha256}"
                    )
    except OSError as error:
        raise ShardError(f"cannot write {path}, the copy of {url}: {error.strerror}") from None


def _pieces(url: str) -> Generator[bytes, None, None]:
    """What an address holds, read by webdataset: curl for http(s), gsutil for gs, a command of its own for a pipe.

    Raises:
        ShardError: it cannot be read to its end.
    """
    # webdataset imports torch, which the preparation of shards does without.
    from webdataset.gopen import gopen

    # webdataset leaves s3 to commands.
    address = f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url
    try:
        source: Any = gopen(address)
    except FileNotFoundError as error:
        missing = (
            f"the program {error.filename} is not installed" if "://" in url else "there is no such file"
        )
        raise ShardError(f"cannot read {url}: {missing}") from None
    except ValueError as error:
        raise ShardError(f"cannot read {url}: {error}") from None
    process = getattr(source, "proc", None)
    # Its buffer cannot be waited for.
    descriptor = getattr(source, "stream", source).fileno()
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    try:
        while True:
            if not waiting.poll(1000 * _SILENCE_SECONDS):
                raise ShardError(f"cannot read {url}: nothing came for {_SILENCE_SECONDS:g} seconds")
            if not (piece := os.read(descriptor, _PIECE_BYTES)):
                break
            yield piece
    except BaseException:
        if process is not None:
            # It may be silent and never end by itself.
            process.kill()
            source.stream.close()
            process.wait()
        raise
    try:
        source.close()
    except OSError:
        assert process is not None
        words = _CURL_FAULTS.get(process.returncode, "") if url.startswith("http") else ""
        reason = words or f"its reader ended with status {process.returncode}"
        raise ShardError(f"cannot read {url}: {reason}") from None
