"""Files of packages: from the configured index by hash, in whatever way its pages are written."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.errors import DocumentError, ShardError
from datamodules.prepare.downloads import PackageFile, fetch_package, find_file, open_member
from tests.datamodules.prepare.packages import sdist


def test_a_download_with_another_hash_is_refused(
    tmp_path: Path, index: Callable[[dict[str, bytes]], str]
) -> None:
    index({"corpora-1.0.tar.gz": b"something else"})
    wanted = PackageFile("corpora", "corpora-1.0.tar.gz", hashlib.sha256(b"the right thing").hexdigest())
    with pytest.raises(ShardError, match=r"corpora-1.0.tar.gz.* its sha256 is .*, wanted "):
        fetch_package(wanted, tmp_path / "packages")
    assert not list((tmp_path / "packages").iterdir())


def test_a_file_that_no_index_has_is_named(tmp_path: Path, index: Callable[[dict[str, bytes]], str]) -> None:
    url = index({})
    with pytest.raises(DocumentError, match=f"cannot download corpora-2.0.tar.gz: {url}: no such file"):
        fetch_package(PackageFile("corpora", "corpora-2.0.tar.gz", "0"), tmp_path / "packages")
    with pytest.raises(DocumentError, match=f"cannot download x-1.tar.gz: {url}: File not found"):
        fetch_package(PackageFile("x", "x-1.tar.gz", "0"), tmp_path / "packages")


def test_a_page_of_an_index_may_be_written_in_any_way(
    tmp_path: Path, index: Callable[[dict[str, bytes]], str]
) -> None:
    url = index({"a&b.whl": b"", "c.whl": b""})
    page = tmp_path / "index" / "simple" / "corpora" / "index.html"
    page.write_text("<a href='../a&amp;b.whl#sha256=1'>a</a><A HREF = \"https://host/c.whl\">c</A>")
    found = [find_file(PackageFile("corpora", name, "0")) for name in ("a&b.whl", "c.whl")]
    assert found == [f"{url}/a&b.whl#sha256=1", "https://host/c.whl"]


def test_an_index_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "simple" / "corpora").mkdir(parents=True)
    (tmp_path / "simple" / "corpora" / "index.html").write_text('<a href="../../c-1.whl">c</a>')
    (tmp_path / "c-1.whl").write_bytes(b"content")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    wanted = PackageFile("corpora", "c-1.whl", hashlib.sha256(b"content").hexdigest())
    assert fetch_package(wanted, tmp_path / "packages").read_bytes() == b"content"


def test_a_member_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(sdist({"x": b""}))
    with (
        pytest.raises(DocumentError, match=r"a\.tar\.gz has no member y"),
        open_member(tmp_path / "a.tar.gz", "y"),
    ):
        pass
