"""Documents in shards: each whole and in one split, bad ones told, in bounded memory."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.prepare.__main__ import main
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.shards import Manifest
from tests import ROOT
from tests.datamodules.corpora import read_split, settings, write_documents


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
