"""Copies of what lies behind addresses: whole or not at all, once for all processes, and one line for each fault."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datamodules import fetch as module
from datamodules.fetch import cache_folder, copies_folder, fetch, is_address, join_url
from datamodules.shards import ShardError
from tests import ROOT
from tests.datamodules.server import FolderServer, serving

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMAND = (
    "import sys; from pathlib import Path; from datamodules.fetch import fetch\n"
    "try: fetch(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3], size_bytes=int(sys.argv[4]))\n"
    "except ValueError as error: print(error); sys.exit(1)"
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    with serving(folder) as server:
        yield server


def process(url: str, path: Path, **more: Any) -> subprocess.Popen[str]:
    """A process that fetches the file of the server."""
    arguments = [url, str(path), SHA256, str(len(CONTENT))]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, **more
    )


def error_of(url: str, path: Path, **more: Any) -> str:
    """The one line of a copy that fails, which leaves nothing behind."""
    with pytest.raises(ShardError) as raised:
        fetch(url, path, **more)
    line = str(raised.value)
    assert "\n" not in line
    assert not path.parent.is_dir() or not list(path.parent.iterdir())
    return line


def test_addresses_are_told_from_folders() -> None:
    for address in ("http://a/b", "https://a", "s3://bucket/x", "pipe:cat x/{}", "gs://a"):
        assert is_address(address)
    for folder in ("shards/mine", "/data/shards", "C:/shards", "a:b", "."):
        assert not is_address(folder)


def test_names_are_joined_to_addresses() -> None:
    assert join_url("http://a/b/", "c.tar") == "http://a/b/c.tar"
    assert join_url("pipe:cat x/{} | cat", "c.tar") == "pipe:cat x/c.tar | cat"


def test_every_address_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CAUSALRN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    one, other = copies_folder("http://a"), copies_folder("http://b")
    assert one.parent == other.parent == tmp_path / "remote"
    assert one != other
    assert copies_folder("http://a", "mine") == Path("mine") / one.name


def test_a_copy_is_fetched_once(server: FolderServer, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "a.tar"
    for _ in range(2):
        fetch(f"{server.url}/a.tar", path, sha256=SHA256, size_bytes=len(CONTENT))
        assert path.read_bytes() == CONTENT
    assert server.asked == {"a.tar": 1}
    assert list(path.parent.iterdir()) == [path]
    # One of another size belongs to an older corpus.
    path.write_bytes(b"older")
    fetch(f"{server.url}/a.tar", path, sha256=SHA256, size_bytes=len(CONTENT))
    assert path.read_bytes() == CONTENT
    # Without a size it is not known whether the copy is still the same.
    fetch(f"{server.url}/a.tar", path)
    assert server.asked == {"a.tar": 3}


def test_commands_are_addresses_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    fetch(f"pipe:cat {tmp_path}/a", tmp_path / "cache" / "a", sha256=SHA256)
    assert (tmp_path / "cache" / "a").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("url", "program", "arguments"),
    [
        ("s3://bucket/a b.tar", "aws", "s3 cp s3://bucket/a b.tar -"),
        ("gs://bucket/a b.tar", "gsutil", "cat gs://bucket/a b.tar"),
    ],
)
def test_buckets_are_read_by_their_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, program: str, arguments: str
) -> None:
    (tmp_path / program).write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    fetch(url, tmp_path / "cache" / "a")
    assert (tmp_path / "cache" / "a").read_text() == f"{arguments}\n"


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("{server}/b.tar", "cannot read {server}/b.tar: the server refused it or has no such file"),
        ("http://127.0.0.1:9/a.tar", "cannot read http://127.0.0.1:9/a.tar: nothing answers there"),
        ("pipe:exit 3", "cannot read pipe:exit 3: its reader ended with status 3"),
        ("pipe:head -c 9 /dev/zero; kill -9 $$", "kill -9 $$: its reader ended with status -9"),
        ("nothing://a/b", "cannot read nothing://a/b: nothing://a/b: no gopen handler defined"),
    ],
)
def test_an_address_that_cannot_be_read(server: FolderServer, tmp_path: Path, url: str, wanted: str) -> None:
    wanted = wanted.replace("{server}", server.url)
    assert wanted in error_of(url.replace("{server}", server.url), tmp_path / "cache" / "a.tar")


@pytest.mark.slow
def test_a_server_that_is_busy_is_asked_again(server: FolderServer, tmp_path: Path) -> None:
    server.busy["a.tar"] = 1
    fetch(f"{server.url}/a.tar", tmp_path / "cache" / "a.tar", sha256=SHA256)
    assert server.asked == {"a.tar": 2}


def test_a_reader_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = error_of("http://127.0.0.1:9/a.tar", tmp_path / "cache" / "a.tar")
    assert line == "cannot read http://127.0.0.1:9/a.tar: the program curl is not installed"


def test_a_command_that_falls_silent_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.2)
    url = f"pipe:echo $$ > {tmp_path}/pid; exec sleep 1000"
    assert error_of(url, tmp_path / "cache" / "a.tar").endswith(": nothing came for 0.2 seconds")
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_an_answer_that_is_cut_short(server: FolderServer, tmp_path: Path) -> None:
    server.cut.add("a.tar")
    line = error_of(f"{server.url}/a.tar", tmp_path / "cache" / "a.tar", sha256=SHA256)
    assert line == f"cannot read {server.url}/a.tar: the answer was cut short"


def test_content_that_is_not_what_the_manifest_lists(server: FolderServer, tmp_path: Path) -> None:
    for given in ("http", "pipe:head -c 99 "):
        url = f"{server.url}/a.tar" if given == "http" else f"{given}{tmp_path}/served/a.tar"
        wanted = "0" * 64 if given == "http" else SHA256
        line = error_of(url, tmp_path / "cache" / "a.tar", sha256=wanted)
        assert line.startswith(f"{url} is truncated or damaged: its sha256 is ")


def test_a_server_that_falls_silent(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.silent.add("a.tar")
    monkeypatch.setattr(module, "_SILENCE_SECONDS", 0.2)
    line = error_of(f"{server.url}/a.tar", tmp_path / "cache" / "a.tar")
    assert line == f"cannot read {server.url}/a.tar: nothing came for 0.2 seconds"


def test_a_cache_that_cannot_be_written(server: FolderServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / "file" / "cache" / "a.tar"
    line = error_of(f"{server.url}/a.tar", path)
    assert line == f"cannot write {path}, the copy of {server.url}/a.tar: Not a directory"


@pytest.mark.slow
def test_a_disk_that_is_full(server: FolderServer, tmp_path: Path) -> None:
    def limit() -> None:
        # A file of more than 300 kB is refused, as a quota would; Python ignores the signal that comes with it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    path = tmp_path / "cache" / "a.tar"
    failed = process(f"{server.url}/a.tar", path, preexec_fn=limit)
    line, _ = failed.communicate(timeout=300)
    assert failed.returncode == 1
    assert line == f"cannot write {path}, the copy of {server.url}/a.tar: File too large\n"
    assert not list(path.parent.iterdir())


@pytest.mark.slow
def test_processes_share_one_copy(server: FolderServer, tmp_path: Path) -> None:
    server.silent.add("a.tar")
    path = tmp_path / "cache" / "a.tar"
    processes = [process(f"{server.url}/a.tar", path) for _ in range(3)]
    wait_for(lambda: server.asked["a.tar"] == 1)
    assert not path.exists()
    server.go_on.set()
    for each in processes:
        assert each.communicate(timeout=300)[0] == ""
        assert each.returncode == 0
    assert server.asked == {"a.tar": 1}
    assert path.read_bytes() == CONTENT


@pytest.mark.slow
def test_a_killed_process_leaves_no_copy_and_the_next_one_makes_it(
    server: FolderServer, tmp_path: Path
) -> None:
    server.silent.add("a.tar")
    path = tmp_path / "cache" / "a.tar"
    killed = process(f"{server.url}/a.tar", path)
    waiting = process(f"{server.url}/a.tar", path)
    wait_for(lambda: server.asked["a.tar"] == 1 and list(path.parent.glob("*.tmp")))
    server.silent.clear()
    holder = next(path.parent.glob("*.tmp")).name.split(".")[-2]
    victim, other = (killed, waiting) if str(killed.pid) == holder else (waiting, killed)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=300)
    assert other.communicate(timeout=300)[0] == ""
    assert other.returncode == 0
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def wait_for(condition: Any) -> None:
    """Waits for what another process does."""
    ends = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)
