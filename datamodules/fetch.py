"""Copies files from http(s), s3 and pipe addresses into a local cache, from which they are read like any other file."""

import contextlib
import hashlib
import os
import re
import select
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from datamodules.errors import ShardError
from datamodules.files import Lock, replacing

_PIECE_BYTES = 1 << 20
# A sender that is silent for so long is given up.
_SILENCE_SECONDS = 60.0
# A server that answers so is busy, and asked again.
_BUSY = (408, 429, 500, 502, 503, 504)
_RETRIES = 30
_RETRY_SECONDS = 2.0
# These write what an address of their scheme holds.
_COMMANDS = {"s3": "aws s3 cp {} -", "gs": "gsutil cat {}"}


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


def open_url(url: str, **headers: str) -> Any:
    """The answer to a request; a server that is busy is asked again.

    Raises:
        OSError: there is no answer, or it is an error.
    """
    request = urllib.request.Request(url, headers=headers)
    retries = _RETRIES
    while True:
        try:
            return urllib.request.urlopen(request, timeout=_SILENCE_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            retries -= 1
            if error.code not in _BUSY or retries < 0:
                raise
        time.sleep(_RETRY_SECONDS)


def reason_of(error: Exception) -> str:
    """Why an address cannot be read, in a few words."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return f"nothing came for {_SILENCE_SECONDS:g} seconds"
    return str(getattr(cause, "strerror", None) or cause)


def _pieces(url: str) -> Generator[bytes, None, None]:
    """What an address holds.

    Raises:
        ShardError: it cannot be read to its end.
    """
    scheme, _, rest = url.partition(":")
    command = rest if scheme == "pipe" else _COMMANDS.get(scheme, "").format(shlex.quote(url))
    try:
        yield from _output(command) if command else _download(url)
    except (OSError, ValueError, HTTPException) as error:
        raise ShardError(f"cannot read {url}: {reason_of(error)}") from None


def _download(url: str) -> Iterator[bytes]:
    with open_url(url) as answer:
        # Python takes a connection that ends for the end of the content, whatever length was announced.
        missing = int(answer.headers["Content-Length"] or 0)
        while piece := answer.read(_PIECE_BYTES):
            missing -= len(piece)
            yield piece
    if missing > 0:
        raise OSError("the answer was cut short")


def _output(command: str) -> Iterator[bytes]:
    """What a shell command writes."""
    # Without a buffer, whose content cannot be waited for.
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN)
        try:
            while True:
                if not waiting.poll(1000 * _SILENCE_SECONDS):
                    raise TimeoutError
                if not (piece := process.stdout.read(_PIECE_BYTES)):
                    break
                yield piece
        except BaseException:
            # It may never end by itself.
            process.kill()
            raise
    if process.returncode:
        raise OSError(f"its reader ended with status {process.returncode}")
