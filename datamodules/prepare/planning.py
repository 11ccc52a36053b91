"""Decides which process reads which part of a corpus, before anything is written."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import DocumentError
from datamodules.prepare.compressed import compression_of, content_bytes, open_compressed
from datamodules.prepare.documents import SUFFIXES, Span, cut, kind_of, read_documents
from datamodules.prepare.packing import PackSettings, assign_split, problem_of
from datamodules.tokenizers import decode_pieces

# A unit of parallel work has about so many bytes of input, which take seconds, so that a kill costs little work.
UNIT_BYTES = 1 << 26
# A corpus of fewer .txt files than this is split by position, because so few documents cannot be split fairly.
_FEW_DOCUMENTS = 20
# A cut moves at most so far to find the end of a line.
_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class Plan:
    """The units of one preparation and where they come from; `key` changes with anything that changes the shards."""

    units: list[list[Span]]
    settings: PackSettings
    source: dict[str, Any]

    @property
    def key(self) -> str:
        spans = [[asdict(span) for span in unit] for unit in self.units]
        files = sorted({span.path for unit in self.units for span in unit})
        stamps = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
        description = [spans, stamps, asdict(self.settings), self.source]
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def plan_files(
    inputs: Sequence[str | Path],
    settings: PackSettings,
    split_by: Literal["auto", "documents", "position"] = "auto",
    exclude: str | Path | None = None,
) -> Plan:
    """Units of about UNIT_BYTES over all files, those below the folder `exclude` left out.

    With "position" each .txt file gives its last part to the test split and the part before to validation, cut at
    line ends; "auto" does so for fewer than 20 .txt files and otherwise splits by document.

    Raises:
        DocumentError: if there is no input, or "position" is asked of other files than .txt.
    """
    files = find_files(inputs, exclude)
    only_text = all(kind_of(path) == ".txt" for path in files)
    if split_by == "auto":
        split_by = "position" if only_text and len(files) < _FEW_DOCUMENTS else "documents"
    if split_by == "position" and not only_text:
        raise DocumentError("a split by position needs .txt files")
    units: list[list[Span]] = []
    unit: list[Span] = []
    size = 0
    for path in files:
        for span in _by_position(path, settings) if split_by == "position" else cut(path, UNIT_BYTES):
            unit.append(span)
            size += _input_bytes(span)
            if size >= UNIT_BYTES:
                units.append(unit)
                unit, size = [], 0
    if unit:
        units.append(unit)
    if not units:
        raise DocumentError(f"nothing but empty files in {', '.join(map(str, inputs))}")
    return Plan(units, settings, {"inputs": [str(given) for given in inputs], "split_by": split_by})


def find_files(inputs: Iterable[str | Path], exclude: str | Path | None = None) -> list[Path]:
    """The files among `inputs` but not below `exclude`, in a stable order.

    Folders are searched recursively for files with a suffix of SUFFIXES; a file that is named is taken whatever it
    is called.

    Raises:
        DocumentError: if an input does not exist, or a folder holds no corpus file.
    """
    files: list[Path] = []
    for given in map(Path, inputs):
        if not given.exists():
            raise DocumentError(f"no such file or folder: {given}")
        if not given.is_dir():
            files.append(given)
            continue
        found = [path for path in given.rglob("*") if path.is_file() and path.name.lower().endswith(SUFFIXES)]
        if exclude is not None:
            left_out = Path(exclude).resolve()
            found = [path for path in found if not path.resolve().is_relative_to(left_out)]
        if not found:
            raise DocumentError(f"no {', '.join(SUFFIXES)} file in {given}")
        files += sorted(found)
    return files


def cut_document(whole: Span) -> list[Span]:
    """A range of a .txt file as spans of about UNIT_BYTES, cut at line ends."""
    path, stop = Path(whole.path), whole.stop or 0
    bounds = [whole.start]
    while bounds[-1] < stop:
        bounds.append(min(_line_end(path, bounds[-1] + UNIT_BYTES, _LINE_BYTES), stop))
    return [
        replace(whole, start=start, stop=end, closes=whole.closes and end == stop)
        for start, end in itertools.pairwise(bounds)
    ]


def plan_texts(plan: Plan, splits: Sequence[str]) -> Iterator[str]:
    """The text of every usable document of some splits, in pieces: what a tokenizer is trained on."""
    for spans in plan.units:
        for span in spans:
            for document in read_documents(span, plan.settings.text_field):
                split = span.split or assign_split(document, plan.settings)
                if split in splits and problem_of(document, plan.settings) is None:
                    yield from decode_pieces(document.pieces())


def _input_bytes(span: Span) -> int:
    if kind_of(span.path) == ".parquet":
        # Row groups have no size in bytes here; each span of them was cut to be a unit.
        return UNIT_BYTES
    return (span.stop if span.stop is not None else os.stat(span.path).st_size) - span.start


def _by_position(path: Path, settings: PackSettings) -> list[Span]:
    size = content_bytes(str(path))
    val_bytes, test_bytes = int(size * settings.val_fraction), int(size * settings.test_fraction)
    # A cut moves by at most half of a split, so that not even a line as long as the file leaves a split without text.
    test_start = _line_end(path, size - test_bytes, min(test_bytes // 2, _LINE_BYTES))
    val_start = _line_end(path, size - test_bytes - val_bytes, min(val_bytes // 2, _LINE_BYTES))
    bounds = {"train": (0, val_start), "val": (val_start, test_start), "test": (test_start, size)}
    spans = [Span(str(path), start, stop, split) for split, (start, stop) in bounds.items() if start < stop]
    if compression_of(path):
        # Each span of a compressed file is found by reading all that lies before it.
        return spans
    return [part for span in spans for part in cut_document(span)]


def _line_end(path: Path, offset: int, within_bytes: int) -> int:
    """The first line end at or after the offset, or the first character start where no line ends soon enough."""
    with open_compressed(str(path), offset) as file:
        # Four bytes hold the start of a character in any case.
        following = file.read(max(within_bytes, 4))
    newline = following.find(b"\n")
    if newline >= 0:
        return offset + newline + 1
    # Bytes 10xxxxxx continue a character of UTF-8.
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
