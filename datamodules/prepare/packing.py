"""Turns one unit of input into token shards: checks, splits and packs documents, and records what it wrote."""

import contextlib
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.errors import DocumentError, TokenizerError
from datamodules.files import write_atomically
from datamodules.prepare.documents import Document, Span, read_documents
from datamodules.prepare.shard_writer import SplitWriter
from datamodules.ranges import check_range
from datamodules.shards import Shard
from datamodules.tokenizers import from_description, token_dtype

SPLITS = ("train", "val", "test")
# The folder in which the records of finished units wait for the manifest.
PARTS = ".parts"


@dataclass(frozen=True)
class PackSettings:
    """Settings that make shards of documents; the same settings and input give the same bytes.

    Attributes:
        tokenizer: description of the tokenizer.
        val_fraction, test_fraction: share of the documents in the two held-out splits.
        seed: chooses which documents those are.
        text_field: the JSON key or parquet column that holds the text.
        on_bad_document: "raise", or "skip" to leave out and count documents that are invalid UTF-8 or hold NUL bytes, and
            records without text.
        check_documents: False for a corpus whose exact bytes are the standard, whatever they are.
        end_documents: whether the end-of-document token follows each document.
        shard_tokens: tokens after which a new shard begins.
    """

    tokenizer: dict[str, Any]
    val_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 0
    text_field: str = "text"
    on_bad_document: Literal["raise", "skip"] = "raise"
    check_documents: bool = True
    end_documents: bool = True
    shard_tokens: int = 1 << 28

    def __post_init__(self) -> None:
        """Raises a ValueError for shares that leave nothing to train on, or shards without a token."""
        check_range(None, "[0, 1)", val_fraction=self.val_fraction, test_fraction=self.test_fraction)
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"val_fraction and test_fraction must be below 1 together: got {self.val_fraction} and {self.test_fraction}"
            )
        check_range(None, "[1, inf)", shard_tokens=self.shard_tokens)


@dataclass
class UnitRecord:
    """The shards and counts of a finished unit, per split."""

    shards: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    skipped_documents: int = 0
    empty_documents: int = 0

    @classmethod
    def load(cls, path: Path) -> "UnitRecord":
        values = json.loads(path.read_bytes())
        values["shards"] = {
            split: [Shard(**shard) for shard in shards] for split, shards in values["shards"].items()
        }
        return cls(**values)


def assign_split(document: Document, settings: PackSettings) -> str:
    """The split of a document by the hash of its beginning, so that copies of a document never leak into another."""
    digest = hashlib.blake2b(next(document.pieces(), b""), digest_size=8, key=str(settings.seed).encode())
    uniform = int.from_bytes(digest.digest(), "little") / 2**64
    if uniform < settings.val_fraction:
        return "val"
    return "test" if uniform < settings.val_fraction + settings.test_fraction else "train"


def pack_unit(folder: Path, unit: int, spans: list[Span], settings: PackSettings) -> UnitRecord:
    """Writes the shards of one unit and, when all are in place, its record.

    Raises:
        DocumentError: if a document is not UTF-8 text and `on_bad_document` is "raise".
        TokenizerError: if the tokens of a document do not give it back.
        ShardError: if a shard cannot be written.
    """
    tokenizer = from_description(settings.tokenizer)
    end = np.array([tokenizer.eot_id])
    dtype = token_dtype(tokenizer.vocab_size)
    record = UnitRecord()
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                SplitWriter(folder, f"{split}-{unit:05d}", dtype, settings.shard_tokens)
            )
            for split in SPLITS
        }
        for span in spans:
            for document in read_documents(span, settings.text_field):
                if _left_out(document, settings, record):
                    continue
                split = span.split or assign_split(document, settings)
                size = 0

                def count(piece: bytes) -> bytes:
                    nonlocal size
                    size += len(piece)
                    return piece

                try:
                    for tokens in tokenizer.encode_pieces(map(count, document.pieces())):
                        writers[split].write(tokens)
                except TokenizerError as error:
                    raise TokenizerError(f"{document.name}: {error}") from None
                if not size:
                    record.empty_documents += 1
                    continue
                record.text_bytes[split] += size
                if span.closes:
                    record.documents[split] += 1
                    if settings.end_documents:
                        writers[split].write(end)
    record.shards = {split: writer.shards for split, writer in writers.items()}
    write_atomically(record_path(folder, unit), json.dumps(asdict(record)).encode())
    return record


def record_path(folder: Path, unit: int) -> Path:
    return folder / PARTS / f"{unit:05d}.json"


def problem_of(document: Document, settings: PackSettings) -> str | None:
    """The reason to keep a document out of the shards, or None."""
    return document.check() if settings.check_documents else document.problem


def _left_out(document: Document, settings: PackSettings, record: UnitRecord) -> bool:
    problem = problem_of(document, settings)
    if problem is None:
        return False
    if settings.on_bad_document == "raise":
        raise DocumentError(f"{document.name}: {problem} (--on-bad-document skip leaves such documents out)")
    print(f"skipped {document.name}: {problem}", file=sys.stderr)
    record.skipped_documents += 1
    return True
