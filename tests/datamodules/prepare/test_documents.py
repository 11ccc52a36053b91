"""Documents out of every kind of file, cut for parallel reading, with the place of what is wrong in the message."""

import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from datamodules.errors import DocumentError
from datamodules.prepare import documents, parquet
from datamodules.prepare.documents import Document, Span, cut, read_documents
from tests.datamodules.corpora import tar_of

TEXTS = ["first", "zweiter Text: ä€😀", "", "line\nbreaks\r\n", "last " * 100]


def read(spans: list[Span], field: str = "text") -> list[str]:
    return [b"".join(doc.pieces()).decode() for span in spans for doc in read_documents(span, field)]


def jsonl(texts: list[str] = TEXTS, field: str = "text") -> bytes:
    return b"".join(json.dumps({"n": 1, field: text}).encode() + b"\n" for text in texts)


def parquet_of(texts: list, **options) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}),
        file,
        compression="NONE",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
        **options,
    )
    return file.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 0xFF
    return bytes(damaged)


def problems(path: Path) -> list[str | None]:
    spans = cut(path, 1 << 20)
    return [document.check() for span in spans for document in read_documents(span, "text")]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".jsonl", bytes),
        (".jsonl.gz", gzip.compress),
        (".jsonl.xz", lzma.compress),
        (".jsonl.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_json_lines(tmp_path: Path, suffix: str, compress) -> None:
    path = tmp_path / f"corpus{suffix}"
    path.write_bytes(compress(jsonl(field="body")))
    assert read(cut(path, 1 << 20), "body") == TEXTS


@pytest.mark.parametrize("unit_bytes", [1, 7, 25, 64, 10_000])
def test_json_lines_are_the_same_however_they_are_cut(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(jsonl() + b"\n" + jsonl(["without a line end"])[:-1])
    assert read(cut(path, unit_bytes)) == [*TEXTS, "without a line end"]


def test_a_long_line_before_a_span_is_passed_over_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 16)
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(jsonl(["x" * 1000, "y"]))
    assert read([Span(str(path), 500, path.stat().st_size)]) == ["y"]


def test_parquet_in_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    texts = [f"document {number}" for number in range(1000)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "n": list(range(1000))}), path, row_group_size=64
    )
    spans = cut(path, path.stat().st_size // 4)
    assert len(spans) > 2
    assert read(spans) == texts


def test_webdataset_shards(tmp_path: Path) -> None:
    path = tmp_path / "corpus.tar"
    members = {"a.txt": b"one", "a.cls": b"7", "b.json": b'{"text": "two"}', "c.txt": b"three"}
    path.write_bytes(tar_of(members))
    assert read(cut(path, 1)) == ["one", "two", "three"]


def test_a_text_file_is_one_document_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"ab" * documents.PIECE_BYTES)
    (document,) = read_documents(Span(str(path)), "text")
    assert [len(piece) for piece in document.pieces()] == [documents.PIECE_BYTES] * 2
    # Asking again begins again, as the check before the reading needs.
    assert sum(map(len, document.pieces())) == 2 * documents.PIECE_BYTES


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([b"good ", b"\xc3", b"\xa4"], None),
        ([b"bad \xff"], "invalid UTF-8 at byte 4: invalid start byte"),
        ([b"cut \xe2\x82"], "invalid UTF-8 at byte 4: unexpected end of data"),
        ([b"ab", b"c\0"], "a NUL byte at byte 3"),
    ],
)
def test_documents_are_checked_across_pieces(content: list[bytes], problem: str | None) -> None:
    assert Document("it", lambda: iter(content)).check() == problem


def test_a_lone_surrogate_in_json_is_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "\\ud800"}\n')
    (document,) = read_documents(Span(str(path)), "text")
    assert "invalid UTF-8" in str(document.check())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl.gz", b"not gzip", "cannot read .*x.jsonl.gz: Not a gzipped file"),
        ("x.jsonl.gz", gzip.compress(jsonl())[:-12], "cannot read .*x.jsonl.gz"),
        # A bit flipped where the first block's kind stands.
        ("x.jsonl.gz", flipped(gzip.compress(jsonl()), 10), "cannot read .*x.jsonl.gz"),
        ("x.jsonl.gz", flipped(gzip.compress(jsonl()), -6), "cannot read .*x.jsonl.gz: CRC check failed"),
        ("x.jsonl.xz", lzma.compress(jsonl())[:-12], "cannot read .*x.jsonl.xz"),
        ("x.jsonl.zst", b"not zstandard", "cannot read .*x.jsonl.zst"),
        ("x.jsonl.zst", zstandard.ZstdCompressor().compress(jsonl())[:-12], "cannot read .*x.jsonl.zst"),
        ("x.tar", b"not a tar" * 100, "cannot read .*x.tar"),
        ("x.tar", tar_of({"a.txt": b"a", "b.txt": b"b"})[:1536], "x.tar: unexpected end of data"),
        ("x.tar", tar_of({"a.txt": b"a", "b.txt": b"b"})[:1024], "x.tar: the end of a file .* at byte 1024"),
        ("x.tar", flipped(tar_of({"a.txt": b"a", "b.txt": b"b"}), 1030), "a damaged header at byte 1024"),
        ("x.parquet", b"not parquet", "cannot read .*x.parquet"),
        ("x.parquet", parquet_of(["a" * 1000])[:-50], "cannot read .*x.parquet"),
        ("x.parquet", flipped(parquet_of(["a" * 1000]), 300), "cannot read .*x.parquet after row 0: .*CRC"),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DocumentError, match=message) as raised:
        read(cut(path, 1 << 20))
    assert "\n" not in str(raised.value)


def test_a_tar_without_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of({"a.npy": b"1"}))
    with pytest.raises(DocumentError, match=r"x\.tar: no \.txt or \.json member"):
        read([Span(str(tmp_path / "x.tar"))])


def test_a_parquet_file_without_the_column_is_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DocumentError, match=r"x\.parquet: no column 'text', only body"):
        read(cut(tmp_path / "x.parquet", 1))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"not json\n", "not JSON at byte {}: Expecting value"),
        (b'{"body": "a"}\n', "wanted an object with a text under 'text'"),
        (b'["a"]\n', "wanted an object with a text under 'text'"),
        (b"[" * 100_000 + b"\n", "not JSON: maximum recursion depth exceeded"),
        (b'{"text": "\xff"}\n', "invalid UTF-8 at byte {}: invalid start byte"),
    ],
)
def test_a_bad_line_is_told_and_the_next_ones_are_read(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(["a"]) + line + jsonl(["b"]))
    first, bad, last = problems(path)
    assert first is last is None
    assert bad is not None
    place = 10 if "UTF-8" in problem else 0
    # In a file of lines, bytes are those of the file.
    assert bad.startswith(problem.format(len(jsonl(["a"])) + place))
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"a.json": jsonl(["a"]), "bad.json": line, "b.json": jsonl(["b"])}))
    first, bad, last = problems(path)
    assert first is last is None
    assert bad is not None
    assert bad.startswith(problem.format(f"{place} of the member"))


def test_a_record_that_would_not_fit_is_told_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(documents, "PIECE_BYTES", 1000)
    long = "b" * (1 << 21)
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(["a", long, "c"]))
    problem = "a JSON line above 1 MiB; put so long a document in a .txt file"
    assert problems(path) == [None, problem, None]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of({"a.json": jsonl([long]), "b.txt": b"b"}))
    assert problems(path) == ["a JSON member above 1 MiB", None]


def test_a_bad_row_is_told_and_the_next_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = pyarrow.array([b"first", b"secon\xff", b"third", None], type=pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts.view(pyarrow.string())}), path)
    assert problems(path) == [
        None,
        "invalid UTF-8 at byte 5 of the text: invalid start byte",
        None,
        "wanted an object with a text under 'text'",
    ]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
@pytest.mark.parametrize("dictionary", [False, True])
def test_every_kind_of_text_column(tmp_path: Path, kind: pyarrow.DataType, dictionary: bool) -> None:
    column = pyarrow.array(["ä", "b", "ä"]).cast(kind)
    table = pyarrow.table({"text": column.dictionary_encode() if dictionary else column})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert read(cut(tmp_path / "x.parquet", 1 << 20)) == ["ä", "b", "ä"]


def test_rows_of_parquet_are_bounded_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    texts = [str(number) * 100 for number in range(100)]
    path.write_bytes(parquet_of(texts))
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 1000)
    assert read(cut(path, 1 << 20)) == texts
    monkeypatch.setattr(parquet, "_MAX_PAGE_BYTES", 10_000)
    with pytest.raises(DocumentError, match=r"x\.parquet: rows of .* a row_group_size of 5., or as \.jsonl"):
        read(cut(path, 1 << 20))
    path.write_bytes(parquet_of(texts, row_group_size=45))
    assert read(cut(path, 1 << 20)) == texts
