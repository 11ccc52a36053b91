"""Which files are read, and where they are cut."""

from pathlib import Path

import pytest

from datamodules.errors import DocumentError
from datamodules.prepare.planning import find_files, plan_files, plan_texts
from datamodules.prepare.preparation import prepare
from tests.datamodules.corpora import read_split, settings


def test_a_named_file_of_any_suffix_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "notes.rst").write_text("text")
    assert find_files([tmp_path / "notes.rst"]) == [tmp_path / "notes.rst"]
    assert "".join(plan_texts(plan_files([tmp_path / "notes.rst"], settings()), ["train"]))


def test_folders_are_searched_but_not_the_output(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "out/train-0.tar", "notes.rst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([tmp_path], exclude=tmp_path / "out")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.txt", "b/2.txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing", "no such file or folder"),
        ("empty", "no .txt, .*file in"),
    ],
)
def test_inputs_that_are_no_corpus(tmp_path: Path, given: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DocumentError, match=message):
        find_files([tmp_path / given])


@pytest.mark.parametrize("name", ["x.tar.gz", "x.parquet.zst"])
def test_kinds_that_cannot_be_read_compressed_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(
        DocumentError, match=f"{name}: a .* file is read in parts, which .* hides: uncompress"
    ):
        plan_files([tmp_path / name], settings())


def test_one_text_file_is_split_by_position_at_line_ends(tmp_path: Path, small_units: None) -> None:
    lines = "".join(f"line {number:05d} ä\n" for number in range(2000))
    (tmp_path / "corpus.txt").write_text(lines)
    manifest = prepare(plan_files([tmp_path / "corpus.txt"], settings()), tmp_path / "out")
    parts = [read_split(tmp_path / "out", split) for split in ("train", "val", "test")]
    # Each part ends with one end-of-document token, however many units it was cut into.
    assert all(part.endswith(b"\n\0") and part.count(b"\0") == 1 for part in parts)
    assert b"".join(parts).replace(b"\0", b"").decode() == lines
    assert abs(len(parts[1]) / len(lines.encode()) - 0.05) < 0.002
    assert [split.documents for split in manifest.splits.values()] == [1, 1, 1]


def test_a_line_without_end_is_cut_between_characters(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("€" * 50_001)
    prepare(plan_files([tmp_path / "corpus.txt"], settings()), tmp_path / "out")
    for split in ("train", "val", "test"):
        assert set(read_split(tmp_path / "out", split).decode()) == {"€", "\0"}
