"""Single files behind http(s), s3 and pipe: addresses: streamed, or copied to a local folder whole or not at all."""

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from webdataset.gopen import Pipe, gopen

from datamodules.shards import MANIFEST, Shard, ShardError

_TIMEOUT_SECONDS = 60


def join_url(base: str, name: str) -> str:
    """The address of a file below a base; a base with `{}` is a template, as in `pipe:aws s3 cp s3://b/{} -`."""
    return base.replace("{}", name) if "{}" in base else f"{base.rstrip('/')}/{name}"


def open_url(url: str) -> IO[bytes] | Pipe:
    """A stream of http(s) by Python itself, of s3 by the `aws` command, of anything else by webdataset.

    Raises:
        ShardError: if the address cannot be opened.
    """
    try:
        if url.startswith(("http://", "https://")):
            return urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS)
        if url.startswith("s3://"):
            url = f"pipe:aws s3 cp {url} -"
        return gopen(url)
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise ShardError(f"cannot open {url}: {error}") from None


def download(url: str, path: Path, sha256: str | None = None) -> None:
    """Copies an address into a file, which appears whole or not at all.

    Raises:
        ShardError: if it cannot be read to its end, or its hash is another.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with open_url(url) as source, temporary.open("wb") as target:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
        if sha256 not in (None, digest.hexdigest()):
            raise ShardError(
                f"{url} is truncated or damaged: its sha256 is not the one that {MANIFEST} lists"
            )
        os.replace(temporary, path)
    except OSError as error:
        raise ShardError(f"cannot read {url}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def fetch(url: str, cache: Path, shard: Shard) -> Path:
    """The local copy of a shard, fetched if there is none of its size: that would be one of an older corpus.

    Raises:
        ShardError: as `download`.
    """
    path = cache / shard.name
    if not path.exists() or path.stat().st_size != shard.size_bytes:
        download(url, path, shard.sha256)
    return path
