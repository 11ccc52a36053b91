"""What stands before, around and instead of UTF-8 text: marks, other encodings, compression; faults are told by their place."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from datamodules.prepare import planning
from datamodules.prepare.__main__ import main
from datamodules.prepare.documents import cut, read_documents
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from tests.datamodules.corpora import read_split, settings, tar_of

MARK = b"\xef\xbb\xbf"
COMPRESS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
LINES = "".join(f"line {number:05d} ä\n" for number in range(2000))


def all_splits(folder: Path) -> dict[str, bytes]:
    return {split: read_split(folder, split) for split in ("train", "val", "test")}


def error_of(capsys: pytest.CaptureFixture[str], *inputs: Path, **more: str) -> str:
    """The last line of a preparation that fails."""
    arguments = [
        "text",
        "--input",
        *map(str, inputs),
        "--output",
        str(inputs[0].parent / "out"),
        "--workers",
        "1",
    ]
    for name, value in more.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    assert main(arguments) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


def read_file(path: Path, unit_bytes: int = 1 << 20) -> list[str]:
    return [
        b"".join(document.pieces()).decode()
        for span in cut(path, unit_bytes)
        for document in read_documents(span, "text")
    ]


@pytest.mark.parametrize("fault", [b"\xff", b"\0"])
@pytest.mark.parametrize("place", [42, 12_002, 25_900, 27_500])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_fault_is_told_by_its_byte_in_the_file(
    tmp_path: Path,
    fault: bytes,
    place: int,
    suffix: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    # Of 28,000 bytes the last 1400 are for test, the 1400 before for validation; training is cut into several units.
    monkeypatch.setattr(planning, "UNIT_BYTES", 5000)
    content = bytearray(LINES.encode())
    content[place] = fault[0]
    path = tmp_path / f"corpus.txt{suffix}"
    path.write_bytes(COMPRESS.get(suffix, bytes)(content))
    error = error_of(capsys, path)
    assert error.startswith(f"prepare: error: {path}: ")
    assert f" at byte {place}" in error


def test_a_fault_in_a_line_of_json_is_told_by_its_byte_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "corpus.jsonl"
    good = MARK + json.dumps({"text": "ä" * 100}, ensure_ascii=False).encode() + b"\n"
    line = f"prepare: error: {path}, line at byte {len(good)}: "
    for bad, problem in [
        (b'{"text": "ab\xff"}', f"invalid UTF-8 at byte {len(good) + 12}: invalid start byte"),
        (b'{"text": "ab\0"}', f"a NUL byte at byte {len(good) + 12}"),
        ('{"text": "ä" x}'.encode(), f"not JSON at byte {len(good) + 14}: Expecting ',' delimiter"),
        (b'{"text": "ab\\u0000"}', "a NUL byte at byte 2 of the text"),
        (b'{"text": "ab\\ud800"}', "invalid UTF-8 at byte 2 of the text: invalid continuation byte"),
    ]:
        path.write_bytes(good + bad + b"\n")
        assert error_of(capsys, path).startswith(line + problem)


def test_rows_of_parquet_are_counted_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    texts = ["good"] * 7 + ["b\0d"] + ["good"] * 2
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2)
    spans = cut(path, 1)
    assert len(spans) == 5
    faults = [
        (document.name, problem)
        for span in spans
        for document in read_documents(span, "text")
        if (problem := document.check())
    ]
    assert faults == [(f"{path}, row 7", "a NUL byte at byte 1 of the text")]


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-16-LE", "UTF-16-BE", "UTF-32", "UTF-32-LE", "UTF-32-BE"])
@pytest.mark.parametrize("name", ["corpus.txt", "corpus.txt.xz", "corpus.jsonl", "corpus.jsonl.bz2"])
def test_another_encoding_is_named(
    tmp_path: Path, encoding: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = "Ein Satz über\tdas Wetter.\nEin zweiter.\n" * 500
    if "jsonl" in name:
        content = json.dumps({"text": content}, ensure_ascii=False) + "\n"
    path = tmp_path / name
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content.encode(encoding)))
    error = error_of(capsys, path)
    assert f": {encoding[:6]} text, wanted UTF-8 (" in error
    assert str(path) in error
    assert "at byte" not in error.partition(": ")[2].partition("text, wanted")[2]


def test_a_binary_file_is_not_taken_for_another_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(np.arange(1000, dtype="<i4").tobytes())
    assert "a NUL byte at byte 0" in error_of(capsys, path)


def test_a_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    record = json.dumps({"text": "text"}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(MARK + record + MARK + record + record)
    assert read_file(tmp_path / "a.jsonl") == ["text"] * 3
    assert read_file(tmp_path / "a.jsonl", unit_bytes=5) == ["text"] * 3
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\ufefftext"}))
    (tmp_path / "a.txt").write_bytes(MARK + b"text")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(MARK + b"text"))
    (tmp_path / "a.tar").write_bytes(tar_of({"a.txt": MARK + b"text", "b.json": MARK + record}))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["\ufefftext"]}), tmp_path / "a.parquet")
    for name, count in [("a.jsonl", 1), ("a.txt", 1), ("a.txt.gz", 1), ("a.tar", 2), ("a.parquet", 1)]:
        assert read_file(tmp_path / name) == ["text"] * count
    # Elsewhere it is a character of the text.
    (tmp_path / "a.txt").write_text("one\n\ufefftwo")
    assert read_file(tmp_path / "a.txt") == ["one\n\ufefftwo"]


def test_marks_are_in_no_shard_and_not_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(MARK + LINES.encode())
    manifest = prepare(plan_files([tmp_path / "a.txt", tmp_path / "b.txt"], settings()), tmp_path / "out")
    parts = all_splits(tmp_path / "out")
    assert MARK not in b"".join(parts.values())
    assert sum(split.text_bytes for split in manifest.splits.values()) == 2 * len(LINES.encode())
    # The byte of a fault is still that of the file.
    (tmp_path / "a.txt").write_bytes(MARK + b"ab\xff")
    (document,) = read_documents(cut(tmp_path / "a.txt", 1)[0], "text")
    assert document.check() == "invalid UTF-8 at byte 5: invalid start byte"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["corpus.txt", "CORPUS.MD", "corpus.jsonl"])
def test_a_compressed_file_gives_the_same_shards(tmp_path: Path, name: str, suffix: str) -> None:
    content = LINES.encode()
    if name == "corpus.jsonl":
        content = b"".join(json.dumps({"text": line}).encode() + b"\n" for line in LINES.splitlines())
    for folder, compress, more in (("plain", bytes, ""), ("packed", COMPRESS[suffix], suffix)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / (name + (more.upper() if name.isupper() else more))).write_bytes(
            compress(content)
        )
        # From a folder, so that it is found by its name too.
        prepare(plan_files([tmp_path / folder], settings()), tmp_path / f"{folder}-shards")
    expected = all_splits(tmp_path / "plain-shards")
    assert all(expected.values())
    assert all_splits(tmp_path / "packed-shards") == expected


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("split_by", ["position", "documents"])
def test_a_compressed_text_that_is_cut_short_ends_the_preparation(
    tmp_path: Path, suffix: str, split_by: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"corpus.txt{suffix}"
    whole = COMPRESS[suffix](LINES.encode())
    for damaged in (whole[:-20], b"no such format"):
        path.write_bytes(damaged)
        error = error_of(capsys, path, split_by=split_by, on_bad_document="skip")
        assert error.startswith(f"prepare: error: cannot read {path}: ")
