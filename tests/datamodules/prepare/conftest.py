"""An index of packages that a test can fill."""

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, bytes]], str]]:
    """Serves files of the project `corpora` the way a package index does; returns its address."""
    root = tmp_path / "index"
    (root / "simple" / "corpora").mkdir(parents=True)
    handler = functools.partial(_Handler, directory=str(root))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def publish(files: dict[str, bytes]) -> str:
        links = []
        for name, content in files.items():
            (root / name).write_bytes(content)
            links.append(f'<a href="../../{name}#sha256={hashlib.sha256(content).hexdigest()}">{name}</a>')
        (root / "simple" / "corpora" / "index.html").write_text("<br>".join(links))
        url = f"http://127.0.0.1:{server.server_port}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", url)
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
        return url

    monkeypatch.setenv("CAUSALRN_CACHE", str(tmp_path / "cache"))
    yield publish
    server.shutdown()
    thread.join()
    server.server_close()
