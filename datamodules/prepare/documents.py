"""Documents out of text, JSON lines, .parquet and WebDataset .tar files, streamed in bounded memory."""

import codecs
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.errors import DocumentError
from datamodules.prepare.compressed import COMPRESSIONS, compression_of, naming_the_file, open_compressed
from datamodules.prepare.parquet import open_parquet, parquet_texts

# The byte order mark of UTF-8, which some editors write at the beginning of a file.
MARK = codecs.BOM_UTF8
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_OTHER_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_LOOKED_AT_BYTES = 1024
# Fewer bytes than these tell nothing of the encoding.
_TELLING_BYTES = 16

# A document longer than one piece is read piece by piece, so that memory does not grow with it.
PIECE_BYTES = 1 << 20
# A JSON document is read at once, so one above this size would take too much memory.
MAX_RECORD_BYTES = 1 << 25
_TAR_BLOCK_BYTES = 512

_RECORDS = (".jsonl", ".parquet", ".tar")
# Files of these kinds may also be compressed.
_STREAMED = (".txt", ".text", ".md", ".jsonl")
SUFFIXES = (*_STREAMED, ".parquet", ".tar", *(kind + how for kind in _STREAMED for how in COMPRESSIONS))


@dataclass(frozen=True)
class Span:
    """A part of an input file: bytes of .txt and .jsonl, row groups of .parquet, the whole of other kinds.

    `split` forces the split of its documents; otherwise each document is assigned by its content. `closes` is False
    where the document goes on in the next span.
    """

    path: str
    start: int = 0
    stop: int | None = None
    split: str | None = None
    closes: bool = True


@dataclass(frozen=True)
class Document:
    """UTF-8 bytes under a name for messages; `pieces` can be called again to read from the beginning.

    Attributes:
        raw_pieces: the bytes as they stand in the file.
        problem: why there is no text where its place in the file holds none.
        start: byte of `within` at which the document begins, for messages.
        within: what bytes are counted in, as in " of the member"; the file if empty.
        opens: whether this is the beginning of the text, and not a later part of it.
    """

    name: str
    raw_pieces: Callable[[], Iterator[bytes]]
    problem: str | None = None
    start: int = 0
    within: str = ""
    opens: bool = True

    def pieces(self) -> Iterator[bytes]:
        """The bytes without the byte order mark that may open them."""
        pieces = self.raw_pieces()
        if self.opens and (first := next(pieces, b"").removeprefix(MARK)):
            yield first
        yield from pieces

    def check(self) -> str | None:
        """Tells what is wrong with the document, or None. NUL bytes are wrong because byte shards end documents with one."""
        if self.problem is not None:
            return self.problem
        fault = self._fault()
        if fault is None:
            return None
        encoding = other_encoding(next(self.raw_pieces(), b""))
        return fault if encoding is None else f"{encoding} text, wanted UTF-8"

    def _fault(self) -> str | None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        read = start = self.start
        try:
            for piece in self.raw_pieces():
                if b"\0" in piece:
                    return f"a NUL byte at byte {read + piece.index(0)}{self.within}"
                # The decoder counts from the bytes of a character that an earlier piece left unfinished.
                start = read - len(decoder.getstate()[0])
                decoder.decode(piece)
                read += len(piece)
            start = read - len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            return f"invalid UTF-8 at byte {start + error.start}{self.within}: {error.reason}"
        return None


def other_encoding(head: bytes) -> str | None:
    """ "UTF-16" or "UTF-32" where the beginning of a text, which is not good UTF-8, is that, else None."""
    for name, marks in _OTHER_MARKS.items():
        if head.startswith(marks):
            return name
    head = head[:_LOOKED_AT_BYTES]
    # Characters below U+0100 have NUL bytes in these encodings, which tells them where no mark does.
    if len(head) < _TELLING_BYTES or head.count(0) * 4 < len(head):
        return None
    return next(
        (name for name in _OTHER_MARKS for order in ("-LE", "-BE") if _is_text(head, name + order)), None
    )


def _is_text(head: bytes, encoding: str) -> bool:
    try:
        # Not final: the last character may be cut off.
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character.isprintable() or character.isspace() for character in text)


def kind_of(path: str | Path) -> str:
    """The suffix that tells what a file holds, whether compressed or not; anything unknown is read as text."""
    name = Path(path).name.lower().removesuffix(compression_of(path))
    return next((suffix for suffix in _RECORDS if name.endswith(suffix)), ".txt")


def cut(path: Path, unit_bytes: int) -> list[Span]:
    """Spans of about `unit_bytes` that separate processes can read; a .txt file is one document, so one span.

    Raises:
        DocumentError: if the file is of a kind that cannot be read where it is compressed.
    """
    size = path.stat().st_size
    kind, compression = kind_of(path), compression_of(path)
    if compression and kind in (".parquet", ".tar"):
        raise DocumentError(
            f"{path}: a {kind} file is read in parts, which {compression} hides: uncompress it"
        )
    if kind == ".jsonl" and not compression:
        return [Span(str(path), start, min(start + unit_bytes, size)) for start in range(0, size, unit_bytes)]
    if kind == ".parquet":
        groups = open_parquet(str(path)).num_row_groups
        per_span = max(1, groups * unit_bytes // max(size, 1))
        return [Span(str(path), g, min(g + per_span, groups)) for g in range(0, groups, per_span)]
    if not size:
        return []
    return [Span(str(path), 0, size)] if kind == ".txt" and not compression else [Span(str(path))]


def read_documents(span: Span, text_field: str) -> Iterator[Document]:
    """The documents of a span in order.

    Raises:
        DocumentError: if the file is damaged or cut short, so that what it held cannot be told.
    """
    kind = kind_of(span.path)
    with naming_the_file(span.path):
        if kind == ".txt":
            yield Document(span.path, _text_pieces(span), start=span.start, opens=not span.start)
        elif kind == ".jsonl":
            yield from _jsonl_documents(span, text_field)
        elif kind == ".parquet":
            for name, text in parquet_texts(span.path, span.start, span.stop or 0, text_field):
                yield _record_document(name, {text_field: text}, text_field)
        else:
            yield from _tar_documents(span, text_field)


def _text_pieces(span: Span) -> Callable[[], Iterator[bytes]]:
    def pieces() -> Iterator[bytes]:
        with open_compressed(span.path, span.start) as file:
            left = span.stop - span.start if span.stop is not None else None
            while piece := file.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left)):
                left = None if left is None else left - len(piece)
                yield piece

    return pieces


def _record_document(name: str, record: Any, text_field: str) -> Document:
    text = record.get(text_field) if isinstance(record, dict) else None
    if isinstance(text, str):
        # A lone surrogate, which JSON can hold, becomes bytes that the check reports as invalid UTF-8.
        text = text.encode("utf-8", "surrogatepass")
    if not isinstance(text, bytes):
        return _problem(name, f"wanted an object with a text under {text_field!r}")
    return _whole(name, text, 0, " of the text")


def _json_document(name: str, content: bytes, text_field: str, start: int, within: str) -> Document:
    marked = content.startswith(MARK)
    try:
        text = content.decode()
        # JSON has neither NUL bytes nor bad UTF-8. The check tells their place, or that the encoding is another.
        if "\0" in text:
            return _whole(name, content, start, within)
        return _record_document(name, json.loads(text[marked:]), text_field)
    except UnicodeDecodeError:
        return _whole(name, content, start, within)
    except json.JSONDecodeError as error:
        place = start + len(error.doc[: error.pos].encode()) + (len(MARK) if marked else 0)
        return _problem(name, f"not JSON at byte {place}{within}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return _problem(name, f"not JSON: {error}")


def _whole(name: str, content: bytes, start: int, within: str) -> Document:
    return Document(name, lambda: iter((content,)), start=start, within=within)


def _problem(name: str, problem: str) -> Document:
    return Document(name, lambda: iter(()), problem)


def _jsonl_documents(span: Span, text_field: str) -> Iterator[Document]:
    with open_compressed(span.path) as file:
        position = span.start
        if span.start:
            # A line belongs to the span in which it starts, so the rest of the line before is passed over. The byte
            # before tells whether there is one.
            file.seek(span.start - 1)
            position += _pass_over_line(file) - 1
        while span.stop is None or position < span.stop:
            line = file.readline(MAX_RECORD_BYTES)
            if not line:
                return
            start = position
            name = f"{span.path}, line at byte {start}"
            position += len(line)
            if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
                position += _pass_over_line(file)
                limit = f"a JSON line above {MAX_RECORD_BYTES >> 20} MiB"
                yield _problem(name, f"{limit}; put so long a document in a .txt file")
            elif line.strip():
                yield _json_document(name, line, text_field, start, "")


def _pass_over_line(file: Any) -> int:
    """Reads to the end of the line, in bounded memory; returns the number of bytes."""
    passed = 0
    while rest := file.readline(PIECE_BYTES):
        passed += len(rest)
        if rest.endswith(b"\n"):
            break
    return passed


def _tar_documents(span: Span, text_field: str) -> Iterator[Document]:
    with tarfile.open(span.path, "r:") as tar:
        found = False
        for member in tar:
            # Without this, tarfile remembers every header of the archive.
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
            name, within = f"{span.path}, member {member.name}", " of the member"
            content = Span(span.path, member.offset_data, member.offset_data + member.size)
            if member.isfile() and member.name.endswith((".txt", ".text")):
                found = True
                yield Document(name, _text_pieces(content), within=within)
            elif member.isfile() and member.name.endswith((".json", ".jsonl")):
                found = True
                if member.size > MAX_RECORD_BYTES:
                    yield _problem(name, f"a JSON member above {MAX_RECORD_BYTES >> 20} MiB")
                else:
                    yield _json_document(name, b"".join(_text_pieces(content)()), text_field, 0, within)
        _check_end(span.path, tar.offset)
        if not found:
            raise DocumentError(f"{span.path}: no .txt or .json member to take text from")


def _check_end(path: str, offset: int) -> None:
    """Raises a ReadError unless an archive ends where reading stopped: tarfile takes damage between members for it."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(_TAR_BLOCK_BYTES)
    if block != bytes(_TAR_BLOCK_BYTES):
        what = (
            "a damaged header" if len(block) == _TAR_BLOCK_BYTES else "the end of a file that was cut short"
        )
        raise tarfile.ReadError(f"{what} at byte {offset}")
