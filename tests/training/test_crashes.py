"""A process that is killed costs the steps since the last checkpoint, and one line says what happened."""

import os
from pathlib import Path

import pytest
import yaml

from causalrn import fit
from causalrn.training.checkpoint import read_checkpoint
from causalrn.training.loggers import read_metrics
from tests.faults import run_starts, start, write_config
from tests.test_fit import error_of
from tests.training.test_preemption import assert_same


def same_weights(one: Path, other: Path) -> None:
    states = [read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (one, other)]
    assert_same(states[0], states[1], "state_dict")


@pytest.mark.slow
def test_killed_ranks_cost_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "config.yaml"))
    faults = {
        "one": {"kind": "SIGKILL", "rank": 1, "step": 6},
        "all": {"kind": "SIGKILL", "rank": "all", "step": 6},
        "write": {"kind": "die in the next write", "rank": 0, "step": 6},
    }
    starts = [start(["--config", config, "--run_dir", str(tmp_path / "whole")])]
    for name, fault in faults.items():
        starts.append(start(["--config", config, "--run_dir", str(tmp_path / name)], fault=fault))
        starts.append(start(["--resume", str(tmp_path / name)]))
    spiky = yaml.safe_load(Path(config).read_text())
    skip = {"policy": "skip", "max_loss": 100.0}
    spiky["trainer"]["callbacks"].append({"class_path": "tests.faults.Spiky", "init_args": skip})
    (tmp_path / "spiky.yaml").write_text(yaml.safe_dump(spiky))
    starts.append(start(["--config", str(tmp_path / "spiky.yaml"), "--run_dir", str(tmp_path / "spiky")]))
    ends = run_starts(starts)
    codes = [entry["codes"] for entry in ends]
    assert codes[0] == [0, 0], ends[0]["output"]
    assert codes[1][1] == -9
    assert codes[1][0] != 0
    assert codes[3] == [-9, -9]
    assert codes[5][0] == -9
    for number, name in ((2, "one"), (4, "all"), (6, "write")):
        assert codes[number] == [0, 0], ends[number]["output"]
        same_weights(tmp_path / "whole", tmp_path / name)
        rows = read_metrics(tmp_path / name / "metrics.csv")
        assert [row["step"] for row in rows] == [*range(12), 12]
    assert not list((tmp_path / "write" / "checkpoints").glob("*.partial"))
    # A step that is bad on one rank is left out on both.
    assert codes[7] == [0, 0], ends[7]["output"]
    optimizer = read_checkpoint(tmp_path / "spiky" / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    assert {float(state["step"]) for state in optimizer["state"].values()} == {10.0}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", strategy="auto", devices=1)


def test_a_data_worker_that_dies_is_one_line(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The out-of-memory killer's way.
    monkeypatch.setattr("datamodules.stream._BatchDataset.__getitem__", lambda *_: os.kill(os.getpid(), 9))
    arguments = [
        "--config",
        str(config),
        "--run_dir",
        str(tmp_path / "run"),
        "--data.init_args.num_workers",
        "1",
    ]
    assert "a data worker process died" in error_of(fit.main, arguments, capsys)
