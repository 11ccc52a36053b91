"""An HTTP server of a folder that counts what it is asked for, and misbehaves on demand."""

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FolderServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        asked: how often each file was asked for.
        busy: how often more each file is refused for the moment.
        cut: files that end after a few bytes, whatever length was announced.
        silent: files that stop after a few bytes until `go_on` is set.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked = Counter[str]()
        self.busy = Counter[str]()
        self.cut: set[str] = set()
        self.silent: set[str] = set()
        self.go_on = threading.Event()


class _Handler(SimpleHTTPRequestHandler):
    server: FolderServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        if self.server.busy[name]:
            self.server.busy[name] -= 1
            self.send_error(503)
            return
        if name not in self.server.cut | self.server.silent:
            super().do_GET()
            return
        assert self.directory is not None
        content = Path(self.directory, name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:700])
        self.wfile.flush()
        if name in self.server.silent and self.server.go_on.wait(60):
            # Whoever asked may have given up.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content[700:])


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[FolderServer]:
    with FolderServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()
