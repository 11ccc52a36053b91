"""Preparing shards: the same bytes from any number of processes, after a kill, and a clear word on every fault."""

import gc
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset

from datamodules.errors import DocumentError
from datamodules.prepare import packing, planning, preparation
from datamodules.prepare.__main__ import main
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.planning import Plan, plan_files
from datamodules.prepare.preparation import prepare
from datamodules.prepare.shard_writer import ShardWriter
from datamodules.shards import Manifest, ShardError, TokenReader
from datamodules.tokenizers import ByteTokenizer
from tests import ROOT

BYTES = ByteTokenizer().describe()


def settings(**more) -> PackSettings:
    return PackSettings(tokenizer=BYTES, **more)


def write_documents(path: Path, count: int, size: int = 200) -> list[str]:
    """A .jsonl of documents that tell their number; returns their texts."""
    texts = [f"document {number}: " + "abcdefghij " * (size // 11) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def read_split(folder: Path, split: str) -> bytes:
    manifest = Manifest.load(folder)
    reader = TokenReader(folder, manifest, split)
    tokens = np.empty(reader.tokens, dtype=reader.dtype)
    reader.read_into(tokens, 0)
    return tokens.tobytes()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.name != ".lock"}


def command(*arguments: object, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "datamodules.prepare", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 5 kB and shards of two members of 1000 tokens, so that small corpora have many of each."""
    monkeypatch.setattr(planning, "UNIT_BYTES", 5000)
    monkeypatch.setattr(packing, "MEMBER_TOKENS", 1000)
    monkeypatch.setattr(preparation, "MEMBER_TOKENS", 1000)


def test_every_document_is_in_one_split_and_whole(tmp_path: Path, small_units: None) -> None:
    texts = write_documents(tmp_path / "corpus.jsonl", 300)
    plan = plan_files(
        [tmp_path / "corpus.jsonl"], settings(val_fraction=0.2, test_fraction=0.1, shard_tokens=2000)
    )
    assert len(plan.units) > 5
    manifest = prepare(plan, tmp_path / "out")
    found = {split: read_split(tmp_path / "out", split).split(b"\0")[:-1] for split in manifest.splits}
    assert sorted(itertools.chain(*found.values())) == sorted(text.encode() for text in texts)
    for split, documents in found.items():
        assert manifest.splits[split].documents == len(documents)
        assert manifest.splits[split].text_bytes == sum(map(len, documents))
        assert manifest.splits[split].tokens == sum(map(len, documents)) + len(documents)
    # Three standard deviations of a binomial with n = 300 and p = 0.2 are 21.
    assert abs(len(found["val"]) - 60) < 21
    assert len(manifest.splits["train"].shards) > len(plan.units)


def test_copies_of_a_document_fall_into_one_split(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(
        (json.dumps({"text": "again"}) + "\n") * 50 + json.dumps({"text": "b"})
    )
    plan = plan_files([tmp_path / "corpus.jsonl"], settings(val_fraction=0.5, test_fraction=0.0, seed=1))
    manifest = prepare(plan, tmp_path / "out")
    assert {split.documents for split in manifest.splits.values()} == {50, 1, 0}


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


@pytest.mark.slow
def test_processes_do_not_change_the_bytes(tmp_path: Path) -> None:
    for number in range(4):
        write_documents(tmp_path / f"{number}.jsonl", 400, size=100_000)
    one, two = (
        prepare(
            plan_files([tmp_path], settings(), exclude=tmp_path / "out"),
            tmp_path / "out" / name,
            workers=workers,
        )
        for name, workers in (("one", 1), ("two", 2))
    )
    assert one == two
    assert content(tmp_path / "out" / "one") == content(tmp_path / "out" / "two")


def test_a_finished_preparation_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents(tmp_path / "corpus.jsonl", 50)
    arguments = ["text", "--input", str(tmp_path / "corpus.jsonl"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    stamp = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert main(arguments) == 0
    assert stamp == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 1
    assert "holds shards of another corpus or settings" in capsys.readouterr().err
    (tmp_path / "out" / "baselines.json").write_text("{}")
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert not (tmp_path / "out" / "baselines.json").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    write_documents(tmp_path / "corpus.jsonl", 50)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    for overwrite in (False, True):
        with pytest.raises(ShardError, match="out is not empty: it holds precious"):
            prepare(
                plan_files([tmp_path / "corpus.jsonl"], settings()), tmp_path / "out", overwrite=overwrite
            )
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_a_preparation_cut_off_between_units_is_finished(
    tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_documents(tmp_path / "corpus.jsonl", 200)
    plan = plan_files([tmp_path / "corpus.jsonl"], settings())
    prepare(plan, tmp_path / "whole")
    units: list[int] = []

    def pack_three(folder: Path, unit: int, *rest):
        if len(units) == 3:
            raise KeyboardInterrupt
        units.append(unit)
        return packing.pack_unit(folder, unit, *rest)

    monkeypatch.setattr(preparation, "pack_unit", pack_three)
    with pytest.raises(KeyboardInterrupt):
        prepare(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(preparation, "MEMBER_TOKENS", 1000)
    monkeypatch.setattr(packing, "MEMBER_TOKENS", 1000)
    prepare(plan, tmp_path / "out")
    assert f"resuming: 3 of {len(plan.units)} units are already prepared" in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["main", "worker"])
def test_a_killed_preparation_is_finished_by_the_same_command(tmp_path: Path, victim: str) -> None:
    for number in range(6):
        write_documents(tmp_path / f"{number}.jsonl", 700, size=100_000)
    arguments = ("text", "--input", tmp_path, "--output", tmp_path / "out", "--workers", 2)
    process = command(*arguments)
    parts = tmp_path / "out" / ".parts"
    # Killed when the first unit of seven is done and others are under way.
    while not list(parts.glob("*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    children = [
        int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(process.pid if victim == "main" else workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (-signal.SIGKILL if victim == "main" else 1)
    if victim == "worker":
        assert errors.strip().splitlines()[-1] == (
            f"prepare: error: a process preparing {tmp_path / 'out'} was killed; run the same command again to finish"
        )
    assert not (tmp_path / "out" / "manifest.json").exists()
    # Nobody is left over to write on.
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)

    process = command(*arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "units are already prepared" in errors
    plan = plan_files([tmp_path], settings(), exclude=tmp_path / "out")
    whole = prepare(plan, tmp_path / "out" / "whole")
    assert Manifest.load(tmp_path / "out").fingerprint == whole.fingerprint
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_two_preparations_into_one_folder(tmp_path: Path) -> None:
    write_documents(tmp_path / "corpus.jsonl", 50)
    plan = plan_files([tmp_path / "corpus.jsonl"], settings())
    (tmp_path / "out").mkdir()
    with preparation._lock(tmp_path / "out", wait_for_other=False):
        with pytest.raises(ShardError, match="another preparation is writing into .*out"):
            prepare(plan, tmp_path / "out")
        waiting = subprocess.Popen(
            [sys.executable, "-c", _WAITING, str(tmp_path / "out")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "ready\n"
        # Taking the lock away is not needed for this process's own writing.
        manifest = preparation._merge(plan, _pack_into(plan, tmp_path / "out"))
        manifest.save(tmp_path / "out")
        assert waiting.poll() is None
    assert waiting.communicate(timeout=300)[0] == f"{manifest.fingerprint}\n"


_WAITING = """
import sys
from datamodules.prepare.presets import plan_preset
from datamodules.prepare.preparation import prepare
plan = plan_preset("state_of_the_union", {"kind": "bytes"})
print("ready", flush=True)
print(prepare(plan, sys.argv[1], wait_for_other=True).fingerprint)
"""


def _pack_into(plan: Plan, folder: Path) -> Path:
    preparation._claim(folder, plan.key, overwrite=False)
    preparation._pack(plan, folder, workers=1)
    return folder


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


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": "b"}\n')
    manifest = prepare(plan_files([tmp_path / "corpus.jsonl"], settings(val_fraction=0.0)), tmp_path / "out")
    assert manifest.empty_documents == 1
    assert read_split(tmp_path / "out", "train") == b"a\0b\0"


@pytest.mark.parametrize("bad", [b"bad \xff byte", b"bad \0 byte"])
def test_bad_documents_are_named_or_left_out_and_counted(
    tmp_path: Path, bad: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_bytes(bad if number == 7 else b"good %d" % number)
    arguments = ["text", "--input", str(tmp_path), "--output", str(tmp_path / "out"), "--seed", "3"]
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"prepare: error: {tmp_path}/7.txt: ")
    assert "at byte 4" in error
    assert main([*arguments, "--on-bad-document", "skip"]) == 0
    captured = capsys.readouterr()
    assert f"skipped {tmp_path}/7.txt" in captured.err
    assert "left out: 1 bad and 0 empty documents" in captured.out
    assert b"bad" not in b"".join(read_split(tmp_path / "out", split) for split in ("train", "val", "test"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "nothing but empty files"),
        ('{"text": ""}\n', "no text for training in .*: every document is empty"),
        ('{"text": "a"}\n', "none of the 1 documents .* fell into the validation split"),
    ],
)
def test_a_corpus_without_text_in_a_split(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "corpus.jsonl").write_text(content)
    with pytest.raises(DocumentError, match=message):
        prepare(plan_files([tmp_path], settings(val_fraction=1e-9, test_fraction=0.0)), tmp_path / "out")


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


@pytest.mark.slow
@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 1 << 30), ("chars", 1 << 28)])
def test_memory_stays_small_on_a_huge_document_in_one_line(tmp_path: Path, tokenizer: str, size: int) -> None:
    with (tmp_path / "corpus.txt").open("wb") as file:
        for _ in range(size >> 20):
            file.write(b"0123456789abcdef" * (1 << 16))
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"small document {number}")
    # Not ru_maxrss, which a process inherits from the one that started it.
    code = "import sys; from datamodules.prepare.__main__ import main; status = main(sys.argv[1:]); "
    code += "print(*[line for line in open('/proc/self/status') if 'VmHWM' in line]); sys.exit(status)"
    arguments = ["text", "--input", tmp_path, "--output", tmp_path / "out", "--tokenizer", tokenizer]
    finished = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--workers", "1", "--seed", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    peak = re.search(r"VmHWM:\s*(\d+) kB", finished.stdout)
    assert peak is not None
    assert int(peak[1]) * 1024 < 500_000_000
    manifest = Manifest.load(tmp_path / "out")
    # pytest keeps the folders of its last runs.
    shutil.rmtree(tmp_path)
    assert sum(split.documents for split in manifest.splits.values()) == 41
    assert sum(split.text_bytes for split in manifest.splits.values()) > size
