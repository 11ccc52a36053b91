"""Times the data side: preparing shards, the first batch of a large corpus, and batches against a bare memory map."""

import argparse
import collections
import itertools
import json
import lzma
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import Lines
from benchmarks.targets import data_targets
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.prepare.presets import STATE_OF_THE_UNION
from datamodules.shards import Manifest, TokenReader
from datamodules.stream import Batch
from datamodules.text import TextDataModule
from datamodules.tokenizers import ByteTokenizer

# Rounds in which the loader and the memory map take turns, so that a disturbance hits both.
ROUNDS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus-mb", type=int, default=10_000, help="size of the simulated corpus (default: 10 GB)"
    )
    parser.add_argument(
        "--text-mb", type=int, default=256, help="text prepared, then repeated (default: 256)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="blocks per batch (default: 32)")
    parser.add_argument("--length", type=int, default=1024, help="tokens per block T (default: 1024)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the loader (default: 1)")
    parser.add_argument("--batches", type=int, default=1000, help="batches of each round (default: 1000)")
    parser.add_argument(
        "--folder", type=Path, help="where to write the text and the shards (default: temporary)"
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """Prints a line per figure and returns them.

    Raises:
        RuntimeError: if the loader and the memory map give different tokens.
    """
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rates = [prepare_seconds(folder, options.text_mb, number) for number in range(3)]
        prepared = statistics.median(options.text_mb / seconds for seconds in rates)
        report("preparing bytes, one process", f"{prepared:,.0f} MB/s")
        manifest = repeat_shards(folder / "shards0", options.corpus_mb * 1_000_000)
        data = data_of(folder, options)
        blocks = data.train_samples().size
        first = first_batch_seconds(folder, options, 0)
        report("first batch of the corpus", f"{first:.2f} s")
        resumed = first_batch_seconds(folder, options, int(0.618 * blocks))
        report("first batch after a resume", f"{resumed:.2f} s")
        ours, bare = token_rates(folder, options, manifest)
        report(f"loader, {options.workers} worker", f"{ours / 1e6:,.0f} million tokens/s")
        report("bare memory map, in process", f"{bare / 1e6:,.0f} million tokens/s")
    record = {
        "benchmark": "data",
        "corpus_bytes": manifest.splits["train"].tokens,
        "batch_size": options.batch_size,
        "length": options.length,
        "workers": options.workers,
        "prepare_mb_per_second": prepared,
        "first_batch_seconds": first,
        "resume_seconds": resumed,
        "tokens_per_second": ours,
        "memmap_tokens_per_second": bare,
        "ratio_to_memmap": bare / ours,
    }
    return record | {"targets": data_targets(record)}, {}


def prepare_seconds(folder: Path, text_mb: int, number: int) -> float:
    """Wall-clock seconds of preparing `text_mb` million bytes of English as byte shards in one process."""
    path = folder / "text.txt"
    if not path.exists():
        lines = lzma.decompress(STATE_OF_THE_UNION.read_bytes()).splitlines()
        speeches = "\n\n".join(json.loads(line)["text"] for line in lines).encode()
        with path.open("wb") as file:
            for written in range(0, text_mb * 1_000_000, len(speeches)):
                file.write(speeches[: text_mb * 1_000_000 - written])
    settings = PackSettings(ByteTokenizer().describe(), val_fraction=0.01, test_fraction=0.0)
    start = time.perf_counter()
    prepare(plan_files([path], settings), folder / f"shards{number}")
    return time.perf_counter() - start


def repeat_shards(folder: Path, wanted_bytes: int) -> Manifest:
    """Lists the training shards under new names, as links, until the corpus has the wanted size."""
    manifest = Manifest.load(folder)
    train = manifest.splits["train"]
    repeats = max(1, wanted_bytes // train.tokens)
    shards = list(train.shards)
    for repeat in range(1, repeats):
        for shard in train.shards:
            name = f"repeat{repeat:05d}-{shard.name}"
            os.link(folder / shard.name, folder / name)
            shards.append(replace(shard, name=name))
    train = replace(
        train, shards=shards, tokens=repeats * train.tokens, text_bytes=repeats * train.text_bytes
    )
    manifest = replace(manifest, splits={**manifest.splits, "train": train})
    manifest.save(folder)
    return manifest


def data_of(folder: Path, options: argparse.Namespace, workers: int | None = None) -> TextDataModule:
    return TextDataModule(
        str(folder / "shards0"),
        options.length,
        options.batch_size,
        num_workers=options.workers if workers is None else workers,
    )


def first_batch_seconds(folder: Path, options: argparse.Namespace, index: int) -> float:
    """Wall-clock seconds from nothing to the batch at a global sample index, the manifest's reading included."""
    start = time.perf_counter()
    data = data_of(folder, options)
    data.setup("fit")
    data.position.index = index
    batches = iter(data.train_dataloader())
    next(batches)
    seconds = time.perf_counter() - start
    # Ends the workers before the next figure is taken.
    del batches
    return seconds


def token_rates(folder: Path, options: argparse.Namespace, manifest: Manifest) -> tuple[float, float]:
    """Median tokens per second of the loader and of the memory map, which read the same blocks in turns."""
    loader = data_of(folder, options).train_dataloader()
    needed = ROUNDS * options.batches + 1
    # A pass may be longer than a small corpus: the stream has no end.
    loader.batches_per_epoch = needed
    ours, bare = iter(loader), memmap_batches(folder, options, manifest, needed)
    check_equal(next(ours), next(bare))
    ours_seconds, bare_seconds = [], []
    for _ in range(ROUNDS):
        last, seconds = take(ours, options.batches)
        ours_seconds.append(seconds)
        bare_last, seconds = take(bare, options.batches)
        bare_seconds.append(seconds)
        check_equal(last, bare_last)
    tokens = options.batches * options.batch_size * options.length
    return tokens / statistics.median(ours_seconds), tokens / statistics.median(bare_seconds)


def take(batches: Iterator[Batch], count: int) -> tuple[Batch, float]:
    """The last of the next `count` batches, and the wall-clock seconds they took."""
    start = time.perf_counter()
    (last,) = collections.deque(itertools.islice(batches, count), maxlen=1)
    return last, time.perf_counter() - start


def memmap_batches(
    folder: Path, options: argparse.Namespace, manifest: Manifest, batches: int
) -> Iterator[Batch]:
    """The loader's batches out of one flat file of the same tokens: the bar for reading them."""
    samples = data_of(folder, options, workers=0).train_samples()
    ids = samples.order(np.arange(batches * options.batch_size)).reshape(batches, options.batch_size)
    flat, period = flat_tokens(folder, options.length, manifest)
    for starts in ids * options.length % period:
        rows = np.stack([flat[start : start + options.length + 1] for start in starts])
        yield {
            "tokens": torch.from_numpy(rows[:, :-1].astype(np.int64)),
            "targets": torch.from_numpy(rows[:, 1:].astype(np.int64)),
        }


def flat_tokens(folder: Path, length: int, manifest: Manifest) -> tuple[npt.NDArray[Any], int]:
    """A memory map of the tokens that repeat, with a block more at its end, and their number."""
    period = sum(
        shard.tokens for shard in manifest.splits["train"].shards if not shard.name.startswith("repeat")
    )
    path = folder / "flat.bin"
    reader = TokenReader(folder / "shards0", manifest, "train")
    tokens = np.empty(period, dtype=reader.dtype)
    reader.read_into(tokens, 0)
    np.concatenate([tokens, tokens[: length + 1]]).tofile(path)
    return np.memmap(path, dtype=reader.dtype, mode="r"), period


def check_equal(ours: Batch, bare: Batch) -> None:
    for name in ("tokens", "targets"):
        if not torch.equal(ours[name], bare[name]):
            raise RuntimeError(f"the loader and the memory map give different {name}")


def report(name: str, figure: str) -> None:
    print(f"{name:<32} {figure}", flush=True)
