"""Prepares a folder of shards: packs the units of a plan in parallel and writes the manifest last."""

import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from datamodules import baselines
from datamodules.errors import DocumentError
from datamodules.files import Lock, write_atomically
from datamodules.prepare.packing import PARTS, SPLITS, UnitRecord, pack_unit, record_path
from datamodules.prepare.planning import Plan
from datamodules.shards import MANIFEST, MEMBER_TOKENS, Manifest, ShardError, Split
from datamodules.tokenizers import from_description, token_dtype

_LOCK = ".lock"


def prepare(
    plan: Plan,
    output: str | Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    wait_for_other: bool = False,
) -> Manifest:
    """Writes the shards of a plan, or finishes what a killed preparation of the same plan began.

    Args:
        plan: what to read and how.
        output: folder of the shards; made if it is not there.
        workers: processes that pack units.
        overwrite: replace an earlier preparation in the folder.
        wait_for_other: where another process prepares the folder, wait and take what it made, as the nodes of one
            job do on a shared file system.

    Raises:
        ShardError: if `output` holds other files or another preparation, or one is at work in it.
        DocumentError: if the input cannot be used.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / _LOCK, f"the folder of shards {folder}", wait=wait_for_other) as lock:
        key = plan.key
        if (folder / MANIFEST).exists() and not overwrite:
            manifest = Manifest.load(folder)
            if lock.waited or manifest.source.get("plan") == key:
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


def _claim(folder: Path, key: str, overwrite: bool) -> None:
    """Leaves the folder with the finished units of this very plan and nothing else of ours."""
    plan_path = folder / PARTS / "plan"
    same = plan_path.exists() and plan_path.read_text() == key
    if not same and (overwrite or plan_path.exists()):
        for path in (folder / MANIFEST, folder / baselines.FILE):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        for split in SPLITS:
            for shard in folder.glob(f"{split}-*.tar"):
                shard.unlink()
    for temporary in folder.glob("*.tmp"):
        temporary.unlink()
    if same:
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name != _LOCK)
    if foreign:
        raise ShardError(f"{folder} is not empty: it holds {foreign[0]}")
    (folder / PARTS).mkdir()
    write_atomically(plan_path, key.encode())


def _pack(plan: Plan, folder: Path, workers: int) -> None:
    missing = [unit for unit in range(len(plan.units)) if not record_path(folder, unit).exists()]
    if done := len(plan.units) - len(missing):
        print(f"resuming: {done} of {len(plan.units)} units are already prepared", file=sys.stderr)
    # A log file gets a line every ten seconds.
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=len(plan.units), initial=done, desc="preparing", unit="unit", mininterval=seconds
    ) as progress:
        if workers <= 1 or len(missing) <= 1:
            for unit in missing:
                pack_unit(folder, unit, plan.units[unit], plan.settings)
                progress.update()
        else:
            for _ in _pack_in_processes(plan, folder, missing, workers):
                progress.update()


def _pack_in_processes(plan: Plan, folder: Path, missing: list[int], workers: int) -> Iterator[UnitRecord]:
    """Packs units in processes of their own; gives the record of each that is finished."""
    # A fork would copy locks that threads of the parent hold, and nobody would release them.
    context = multiprocessing.get_context("spawn")
    processes = min(workers, len(missing))
    with ProcessPoolExecutor(processes, context, _end_with_parent, (os.getpid(),)) as pool:
        tasks = [pool.submit(pack_unit, folder, unit, plan.units[unit], plan.settings) for unit in missing]
        try:
            for task in as_completed(tasks):
                yield task.result()
        except BrokenProcessPool:
            raise ShardError(
                f"a process preparing {folder} was killed; run the same command again to finish"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent(parent: int) -> None:
    """Starts a thread that ends this process when its parent is gone: a killed parent cannot tell its workers."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
    inputs = ", ".join(plan.source.get("inputs", [plan.source.get("preset", "the corpus")]))
    if not splits["train"].tokens:
        raise DocumentError(f"no text for training in {inputs}: every document is empty, bad or held out")
    if not splits["val"].tokens and plan.settings.val_fraction:
        raise DocumentError(
            f"none of the {splits['train'].documents} documents of {inputs} fell into the validation split: raise "
            f"--val-fraction ({plan.settings.val_fraction}) or change --seed ({plan.settings.seed})"
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
