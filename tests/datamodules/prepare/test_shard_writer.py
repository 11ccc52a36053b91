"""Shards are plain WebDataset files whose every byte the manifest accounts for, or they are not there."""

import gc
import os
import resource
import subprocess
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset

from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.prepare.shard_writer import ShardWriter
from datamodules.shards import Manifest, ShardError
from tests.datamodules.corpora import command, read_split, settings, write_documents


@pytest.mark.slow
def test_shards_are_plain_webdataset_files(tmp_path: Path, small_units: None) -> None:
    write_documents(tmp_path / "corpus.jsonl", 100)
    prepare(plan_files([tmp_path / "corpus.jsonl"], settings()), tmp_path / "out")
    shards = sorted(map(str, (tmp_path / "out").glob("train-*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode()  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings():
        # webdataset leaves files to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(dataset)
        gc.collect()
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    assert np.concatenate([sample["npy"] for sample in samples]).tobytes() == read_split(
        tmp_path / "out", "train"
    )


def test_the_manifest_says_where_tokens_lie_and_what_shards_hash_to(
    tmp_path: Path, small_units: None
) -> None:
    write_documents(tmp_path / "corpus.jsonl", 100)
    manifest = prepare(plan_files([tmp_path / "corpus.jsonl"], settings()), tmp_path / "out")
    assert Manifest.load(tmp_path / "out") == manifest
    for shard in manifest.splits["train"].shards:
        path = tmp_path / "out" / shard.name
        digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
        assert digest.split()[0] == shard.sha256
        assert path.stat().st_size == shard.size_bytes
        with tarfile.open(path) as tar:
            ends = [info.offset_data + info.size for info in tar]
        lengths = [1000] * (len(ends) - 1) + [shard.tokens - 1000 * (len(ends) - 1)]
        assert [end - length for end, length in zip(ends, lengths, strict=True)] == shard.offsets


def test_a_full_disk_names_the_shard_and_leaves_nothing(tmp_path: Path) -> None:
    # Writing to /dev/full fails as a full disk does.
    temporary = tmp_path / f"train-00000-000.tar.{os.getpid()}.tmp"
    temporary.symlink_to("/dev/full")
    writer = ShardWriter(tmp_path / "train-00000-000.tar", "uint8")
    with pytest.raises(
        ShardError, match=r"cannot write shard .*train-00000-000\.tar: No space left on device"
    ):
        # More than the buffer of the file holds.
        writer.write_member(np.zeros(1 << 20, dtype=np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_command_in_one_line(tmp_path: Path) -> None:
    write_documents(tmp_path / "corpus.jsonl", 100, size=10_000)

    def limit() -> None:
        # A file of more than 300 kB is refused, as a quota would; Python ignores the signal that comes with it.
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = command(
        "text", "--input", tmp_path / "corpus.jsonl", "--output", tmp_path / "out", preexec_fn=limit
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert (
        errors.strip()
        .splitlines()[-1]
        .startswith(f"prepare: error: cannot write shard {tmp_path}/out/train-")
    )
    assert not list((tmp_path / "out").glob("*.tar*"))
