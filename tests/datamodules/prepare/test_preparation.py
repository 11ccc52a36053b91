"""Preparing shards: the same bytes from any number of processes, after a kill, and a clear word on every fault."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from datamodules.errors import DocumentError
from datamodules.prepare import packing, planning, preparation
from datamodules.prepare.__main__ import main
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.shards import Manifest, ShardError
from tests import ROOT
from tests.datamodules.corpora import command, settings, write_documents


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.name != ".lock"}


@pytest.mark.slow
def test_processes_do_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "UNIT_BYTES", 1 << 22)
    for number in range(4):
        write_documents(tmp_path / f"{number}.jsonl", 100, size=100_000)
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
    monkeypatch.setattr(preparation, "pack_unit", packing.pack_unit)
    prepare(plan, tmp_path / "out")
    assert f"resuming: 3 of {len(plan.units)} units are already prepared" in capsys.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["main", "worker"])
def test_a_killed_preparation_is_finished_by_the_same_command(
    tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit_bytes = 1 << 23
    monkeypatch.setattr(planning, "UNIT_BYTES", unit_bytes)
    for number in range(6):
        write_documents(tmp_path / f"{number}.jsonl", 200, size=100_000)
    arguments = ("text", "--input", tmp_path, "--output", tmp_path / "out", "--workers", 2)
    process = command(*arguments, unit_bytes=unit_bytes)
    parts = tmp_path / "out" / ".parts"
    # It is killed when the first of about fifteen units is done and others are under way.
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

    process = command(*arguments, unit_bytes=unit_bytes)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "units are already prepared" in errors
    plan = plan_files([tmp_path], settings(), exclude=tmp_path / "out")
    whole = prepare(plan, tmp_path / "out" / "whole")
    assert Manifest.load(tmp_path / "out").fingerprint == whole.fingerprint
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.slow
def test_two_preparations_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out"
    write_documents(corpus, 50)
    begun, go_on = threading.Event(), threading.Event()

    def pack_later(*arguments: Any) -> packing.UnitRecord:
        begun.set()
        assert go_on.wait(300)
        return packing.pack_unit(*arguments)

    monkeypatch.setattr(preparation, "pack_unit", pack_later)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(prepare, plan_files([corpus], settings()), out)
        try:
            assert begun.wait(300)
            refused = command("text", "--input", corpus, "--output", out)
            _, error = refused.communicate(timeout=300)
            assert error.startswith(
                f"prepare: error: the folder of shards {out} is in use by process {os.getpid()} on "
            )
            assert refused.returncode == 1
            waiting = subprocess.Popen(
                [sys.executable, "-c", _WAITING, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "ready\n"
            assert waiting.poll() is None
        finally:
            go_on.set()
        manifest = first.result()
    # What it waited for is taken, although it would have prepared another corpus.
    assert waiting.communicate(timeout=300)[0] == f"{manifest.fingerprint}\n"


_WAITING = """
import sys
from datamodules.prepare.presets import plan_preset
from datamodules.prepare.preparation import prepare
plan = plan_preset("state_of_the_union", {"kind": "bytes"})
print("ready", flush=True)
print(prepare(plan, sys.argv[1], wait_for_other=True).fingerprint)
"""


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
