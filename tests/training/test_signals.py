"""Ctrl-C: before training it leaves at once; in training it saves, and both the same command and --resume go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from causalrn.training import signals
from causalrn.training.checkpoint import read_checkpoint
from causalrn.training.errors import run_command
from tests.faults import FAULT, ROOT, run_starts, start, write_config
from tests.training.test_crashes import same_weights
from tests.training.test_preemption import losses


def begin(args: list[str], *path: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts causalrn.fit as a terminal does: with Ctrl-C not ignored, whoever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "causalrn.fit", *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    return process


def press(process: subprocess.Popen[str], once: Path) -> tuple[int, str]:
    """Ctrl-C as soon as a file is there; exit code and output."""
    while not once.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_during_the_imports_it_leaves_at_once(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import time, pathlib\n"
        "pathlib.Path(__file__).with_name('importing').touch()\n"
        "while True: time.sleep(0.05)\n"
    )
    assert press(begin([], tmp_path), tmp_path / "importing") == (130, "")


@pytest.mark.slow
def test_in_training_it_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "config.yaml", num_workers=1, strategy="auto", devices=1))
    run_dir = tmp_path / "run"
    command = ["--config", config, "--run_dir", str(run_dir)]
    fault = {"kind": "wait for a signal", "rank": 0, "step": 2}
    code, output = press(begin(command, **{FAULT: json.dumps(fault)}), run_dir / "waiting")
    assert code == 130, output
    assert "Ctrl-C: saves at the end of this step and leaves" in output
    assert "SIGINT: saved at step 3; exit code 130, start again to continue" in output
    assert "Traceback" not in output
    assert [path.name for path in (run_dir / "checkpoints").glob("pre*")] == ["preempted-step=3.ckpt"]
    process = begin(command)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "preempted-step=3.ckpt, step 3" in output
    assert read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 12


@pytest.mark.slow
def test_on_several_ranks_the_run_is_bit_for_bit_the_undisturbed_one(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "config.yaml", num_workers=1))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["--config", config, "--run_dir", str(broken)]
    interrupted = [
        # Nothing is saved, and nothing is in the way of the next start.
        start(command, fault={"kind": "SIGINT", "rank": "all", "step": 0, "where": "setup"}),
        # A terminal sends it to all, data workers included; ...
        start(command, fault={"kind": "SIGINT", "rank": "all", "step": 2}),
        start(command, fault={"kind": "SIGINT", "rank": "all", "step": 4, "where": "validation"}),
        # ... torchrun passes it on to those that have it already.
        start(["--resume", str(broken)], fault={"kind": "SIGINT twice", "rank": 1, "step": 6}),
        # Once more is at once, even where a rank waits in a collective.
        start(command, fault={"kind": "SIGINT thrice", "rank": "all", "step": 8}),
        start(
            ["--resume", str(broken)],
            fault={"kind": "SIGINT", "rank": 0, "step": 12, "where": "closing validation"},
        ),
    ]
    first, *others, last = run_starts(
        [start(["--config", config, "--run_dir", str(whole)]), *interrupted, start(command)]
    )
    assert first["codes"] == [0, 0], first["output"]
    codes = [entry["codes"] for entry in others]
    assert codes == [[130, 130], [130, 0], [130, 0], [130, 0], [130, 130], [130, 0]], others
    for entry in others:
        assert "Traceback" not in entry["output"], entry["output"]
    assert last["codes"] == [0, 0], last["output"]
    same_weights(whole, broken)
    assert losses(whole)[-1] == losses(broken)[-1]
    assert not list((broken / "checkpoints").glob("preempted-*"))


def test_it_never_comes_back_into_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What each program was asked is left beside it.
    for name in ("squeue", "scontrol"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/{name}.asked\necho RUNNING\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not signals.requeue({signal.SIGINT})
    assert not signals.requeue({signal.SIGINT, signal.SIGUSR1})
    assert not list(tmp_path.glob("*.asked"))
    assert signals.requeue({signal.SIGUSR1})
    assert (tmp_path / "scontrol.asked").read_text() == "requeue 7\n"


def test_lightnings_own_answer_is_replaced() -> None:
    def command() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == 130
