"""Prepares a folder of shards: plans units of input, packs them in parallel and writes the manifest last."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from datamodules.documents import DocumentError, Span, cut, find_files, kind_of, read_documents
from datamodules.packing import (
    PARTS,
    SPLITS,
    PackSettings,
    UnitRecord,
    assign_split,
    pack_unit,
    record_path,
)
from datamodules.shards import MANIFEST, MEMBER_TOKENS, Manifest, ShardError, Split, write_atomically
from datamodules.tokenizers import decode_pieces, from_description, token_dtype

# Input bytes of one unit of parallel work: seconds of work, so that little is repeated after a kill.
UNIT_BYTES = 1 << 26
# A corpus of fewer .txt files than this is split by position, because so few documents cannot be split fairly.
_FEW_DOCUMENTS = 20


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
) -> Plan:
    """Units of about UNIT_BYTES over all files.

    With "position" each .txt file gives its last part to the test split and the part before to validation, cut at
    line ends; "auto" does so for fewer than 20 .txt files and otherwise splits by document.

    Raises:
        DocumentError: if there is no input, or "position" is asked of other files than .txt.
    """
    files = find_files(inputs)
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
            size += (span.stop or 0) - span.start if kind_of(path) != ".parquet" else UNIT_BYTES
            if size >= UNIT_BYTES:
                units.append(unit)
                unit, size = [], 0
    if unit:
        units.append(unit)
    if not units:
        raise DocumentError(f"nothing but empty files in {', '.join(map(str, inputs))}")
    return Plan(units, settings, {"inputs": [str(given) for given in inputs], "split_by": split_by})


def prepare(plan: Plan, output: str | Path, *, workers: int = 1, overwrite: bool = False) -> Manifest:
    """Writes the shards of a plan, or finishes what a killed preparation of the same plan began.

    Raises:
        ShardError: if `output` holds other files or another preparation, or one is at work in it.
        DocumentError: if the input cannot be used.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        key = plan.key
        if (folder / MANIFEST).exists() and not overwrite:
            manifest = Manifest.load(folder)
            if manifest.source.get("plan") == key:
                return manifest
            raise ShardError(
                f"{folder} holds shards of another corpus or settings: choose another, or --overwrite"
            )
        _claim(folder, key, overwrite)
        _pack(plan, folder, workers)
        manifest = _merge(plan, folder)
        manifest.save(folder)
        shutil.rmtree(folder / PARTS)
    return manifest


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        try:
            # Released by the system when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"another preparation is writing into {folder}") from None
        yield


def _claim(folder: Path, key: str, overwrite: bool) -> None:
    """Leaves the folder with the finished units of this very plan and nothing else of ours."""
    plan_path = folder / PARTS / "plan"
    if plan_path.exists() and plan_path.read_text() == key:
        return
    if overwrite or plan_path.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        for split in SPLITS:
            for shard in folder.glob(f"{split}-*.tar*"):
                shard.unlink()
    foreign = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    if foreign:
        raise ShardError(f"{folder} is not empty: it holds {foreign[0]}")
    (folder / PARTS).mkdir()
    write_atomically(plan_path, key.encode())


def _pack(plan: Plan, folder: Path, workers: int) -> None:
    missing = [unit for unit in range(len(plan.units)) if not record_path(folder, unit).exists()]
    progress = _Progress(len(plan.units), len(plan.units) - len(missing))
    if workers <= 1 or len(missing) <= 1:
        for unit in missing:
            pack_unit(folder, unit, plan.units[unit], plan.settings)
            progress.advance()
        return
    # Forking would copy the threads' locks of a parent that has torch loaded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context) as pool:
        tasks = {
            pool.submit(pack_unit, folder, unit, plan.units[unit], plan.settings): unit for unit in missing
        }
        try:
            for task in as_completed(tasks):
                task.result()
                progress.advance()
        except BrokenProcessPool:
            raise ShardError(
                f"a process preparing {folder} was killed; run the same command again to finish"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _merge(plan: Plan, folder: Path) -> Manifest:
    records = [UnitRecord.load(record_path(folder, unit)) for unit in range(len(plan.units))]
    splits = {
        split: Split(
            documents=sum(record.documents[split] for record in records),
            text_bytes=sum(record.text_bytes[split] for record in records),
            tokens=sum(shard.tokens for record in records for shard in record.shards[split]),
            shards=[shard for record in records for shard in record.shards[split]],
        )
        for split in SPLITS
    }
    if not splits["train"].tokens:
        raise DocumentError(
            f"no text for training in {plan.source}: every document is empty, bad or held out"
        )
    tokenizer = from_description(plan.settings.tokenizer)
    return Manifest(
        tokenizer=plan.settings.tokenizer,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size),
        member_tokens=MEMBER_TOKENS,
        splits=splits,
        source={**plan.source, "plan": plan.key},
        skipped_documents=sum(record.skipped_documents for record in records),
        empty_documents=sum(record.empty_documents for record in records),
    )


def cut_document(whole: Span) -> list[Span]:
    """A range of a .txt file as spans of about UNIT_BYTES, cut at line ends."""
    path, stop = Path(whole.path), whole.stop or 0
    bounds = [whole.start]
    while bounds[-1] < stop:
        bounds.append(min(_line_end(path, bounds[-1] + UNIT_BYTES), stop))
    return [
        replace(whole, start=start, stop=end, closes=whole.closes and end == stop)
        for start, end in itertools.pairwise(bounds)
    ]


def plan_texts(plan: Plan, splits: Sequence[str]) -> Iterator[str]:
    """The text of every usable document of some splits, in pieces: what a tokenizer is trained on."""
    for spans in plan.units:
        for span in spans:
            for document in read_documents(span, plan.settings.text_field):
                if (span.split or assign_split(document, plan.settings)) in splits and (
                    not plan.settings.check_documents or document.check() is None
                ):
                    yield from decode_pieces(document.pieces())


def _by_position(path: Path, settings: PackSettings) -> list[Span]:
    size = path.stat().st_size
    val_start = _line_end(path, int(size * (1 - settings.val_fraction - settings.test_fraction)))
    test_start = _line_end(path, int(size * (1 - settings.test_fraction)))
    bounds = {"train": (0, val_start), "val": (val_start, test_start), "test": (test_start, size)}
    spans = [Span(str(path), start, stop, split) for split, (start, stop) in bounds.items() if start < stop]
    return [part for span in spans for part in cut_document(span)]


def _line_end(path: Path, offset: int) -> int:
    """The first line end at or after the offset, or the first character start where no line ends within 64 KiB."""
    with path.open("rb") as file:
        file.seek(offset)
        following = file.read(1 << 16)
    newline = following.find(b"\n")
    if newline >= 0:
        return offset + newline + 1
    # Bytes 10xxxxxx continue a character of UTF-8.
    return offset + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


class _Progress:
    """A bar on a terminal, a plain line now and then elsewhere, both on stderr."""

    _LINE_SECONDS = 10.0

    def __init__(self, units: int, done: int) -> None:
        self.units = units
        self.done = done
        self._last_seconds = time.monotonic()
        if done:
            print(f"resuming: {done} of {units} units are already prepared", file=sys.stderr)

    def advance(self) -> None:
        self.done += 1
        if sys.stderr.isatty():
            filled = 40 * self.done // self.units
            bar = "#" * filled + "." * (40 - filled)
            end = "\n" if self.done == self.units else ""
            print(f"\rpreparing [{bar}] {self.done}/{self.units} units", end=end, file=sys.stderr, flush=True)
        elif self.done == self.units or time.monotonic() - self._last_seconds > self._LINE_SECONDS:
            self._last_seconds = time.monotonic()
            print(f"prepared {self.done} of {self.units} units", file=sys.stderr, flush=True)
