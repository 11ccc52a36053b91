"""What may kill a run in the middle: it costs the steps since the last checkpoint, and says what happened."""

import contextlib
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from causalrn import fit
from causalrn.training.callbacks import Heartbeat
from causalrn.training.callbacks.heartbeat import EXIT_HUNG, Beat
from causalrn.training.checkpoint import load_network, newest_checkpoint, read_checkpoint
from causalrn.training.checkpoint_io import BackgroundCheckpointIO, snapshot, write_file
from causalrn.training.loggers import read_metrics
from tests.faults import FAULT, run_starts, start, write_config
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


@pytest.mark.slow
def test_a_hung_rank_is_named(tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "tests.faults.Fault"},
        {"class_path": "causalrn.training.callbacks.Heartbeat", "init_args": {"timeout_seconds": 20.0}},
    ]
    config = str(write_config(tmp_path / "config.yaml", callbacks=callbacks))
    stopped, slow = run_starts(
        [
            start(
                ["--config", config, "--run_dir", str(tmp_path / kind)],
                fault={"kind": kind, "rank": 1, "step": 2},
            )
            for kind in ("SIGSTOP", "sleep")
        ]
    )
    assert EXIT_HUNG in stopped["codes"]
    assert re.search(
        r"error: no progress for 20 s on rank 0 of 2, at step 2, .*: "
        r"rank 1 \(process \d+ on .*\) has not answered for \d+ s, last seen at step \d",
        stopped["output"],
    )
    assert EXIT_HUNG in slow["codes"]
    assert re.search(
        r"rank 1 \(process \d+ on .*\) has not moved for \d+ s at step 2, loading data", slow["output"]
    )


def test_the_diagnosis_names_those_behind() -> None:
    watcher = Heartbeat(60.0)
    watcher.rank, watcher.ranks, watcher.place = 0, 3, (7, 2)
    beats = {0: (Beat(7, 2, 70.0, "a", 10), 1.0), 2: (Beat(6, 3, 71.0, "b", 12), 2.0)}
    line = watcher.diagnosis(beats, silence_seconds=20)
    assert line.endswith("at step 7, backward: rank 1 is gone")
    beats[1] = (Beat(7, 2, 70.0, "a", 11), 1.0)
    assert "rank 2 (process 12 on b) has not moved for 71 s at step 6, optimizer step" in watcher.diagnosis(
        beats, silence_seconds=20
    )
    with pytest.raises(ValueError, match="timeout_seconds must be above 0: got 0"):
        Heartbeat(0)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", strategy="auto", devices=1)


def fit_in(run_dir: Path, config: Path, *arguments: str) -> None:
    fit.main(["--config", str(config), "--run_dir", str(run_dir), *arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    fit_in(folder / "run", write_config(folder / "config.yaml", strategy="auto", devices=1))
    return folder / "run"


def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, config: Path, whole: Path
) -> None:
    fit_in(tmp_path / "run", config)
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    os.truncate(newest, newest.stat().st_size - 100)
    with pytest.warns(UserWarning, match=f"checkpoint {newest} is passed over: .* truncated"):
        fit.main(["--resume", str(tmp_path / "run")])
    same_weights(whole, tmp_path / "run")


def test_a_folder_that_lost_a_file_is_passed_over(tmp_path: Path) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    for folder in (old, new):
        folder.mkdir()
        (folder / "sizes.json").write_text('{"rank-0": 4}')
        # As beside the shards of FSDP.
        torch.save({"global_step": 2 if folder == new else 1, "loops": {}}, folder / "meta.pt")
    (old / "rank-0").write_bytes(b"1234")
    (new / "rank-0").write_bytes(b"123")
    with pytest.warns(UserWarning, match="rank-0 is missing or cut short"):
        assert newest_checkpoint(tmp_path) == old


@contextlib.contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A file system of its own, or skips where none can be mounted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        # Lazily: checkpoints that were read are still mapped.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, config: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (whole / "checkpoints" / "last.ckpt").stat().st_size
    with small_disk(tmp_path / "run" / "checkpoints", 3 * size // 2048) as folder:
        capsys.readouterr()
        arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
        with pytest.warns(UserWarning, match="was not written .*bytes are free.*training goes on"):
            line = error_of(fit.main, arguments, capsys)
        assert "step=12.ckpt was not written" in line
        kept = newest_checkpoint(folder)
        assert kept is not None
        assert read_checkpoint(kept)["global_step"] == 4
        assert [path.name for path in folder.iterdir() if not path.is_symlink()] == [kept.name]
        assert (folder / "last.ckpt").resolve() == kept
        subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
        fit.main(["--resume", str(tmp_path / "run")])
        same_weights(whole, tmp_path / "run")


def test_a_file_size_limit_is_a_full_disk_too(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="a.ckpt was not written .*bytes are free"):
            write_file({"weights": torch.ones(100_000)}, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_is_of_its_moment_and_keeps_tensors_one(tmp_path: Path) -> None:
    weight = torch.ones(3)
    copy = snapshot({"a": weight, "b": [weight.view(3)], "c": weight[:2], "step": 3})
    weight.zero_()
    assert copy["a"].tolist() == [1, 1, 1]
    assert copy["a"] is copy["b"][0]
    assert copy["c"].tolist() == [1, 1]
    io = BackgroundCheckpointIO()
    big = {"network": {}, "state_dict": {"weight": torch.zeros(1_000_000)}}
    io.save_checkpoint(big, tmp_path / "a.ckpt")
    big["state_dict"]["weight"].fill_(1)
    io.save_checkpoint(big, tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    io.teardown()
    assert read_checkpoint(tmp_path / "last.ckpt")["state_dict"]["weight"].sum() == 1_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.ckpt", "last.ckpt"]
    write_file({**big, "state_dict": {}}, tmp_path / "c.ckpt")
    assert (tmp_path / "last.ckpt").resolve().name == "c.ckpt"


@pytest.fixture
def nan_at_step_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT, '{"kind": "nan", "rank": 0, "step": 5}')


def with_policy(config: Path, **settings: Any) -> Path:
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"].append(
        {"class_path": "causalrn.training.callbacks.FiniteLoss", "init_args": settings}
    )
    config.write_text(yaml.safe_dump(content))
    return config


@pytest.mark.usefixtures("nan_at_step_5")
def test_a_bad_loss_stops_with_a_dump(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", str(config), "--run_dir", str(tmp_path / "run")]
    line = error_of(fit.main, arguments, capsys)
    dump = tmp_path / "run" / "bad_step-5-rank-0.pt"
    assert "training loss is nan at step 5; want a finite one" in line
    assert str(dump) in line
    content = torch.load(dump, weights_only=True)
    assert len(content["batches"]) == 2
    assert torch.tensor(list(content["gradient_norms"].values())).isnan().any()
    network = load_network(dump)
    assert network(content["batches"][0]["tokens"]).isnan().any()


def test_a_bad_step_is_left_out_and_counted(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"policy": "skip", "max_skipped": 2, "max_loss": 100.0}
    with_policy(config, **settings)
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"][-1]["class_path"] = "tests.faults.Spiky"
    config.write_text(yaml.safe_dump(content))
    fit_in(tmp_path / "run", config)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    skipped = [row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row]
    assert skipped == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    optimizer = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    assert {float(state["step"]) for state in optimizer["state"].values()} == {10.0}
    capsys.readouterr()
    content["trainer"]["callbacks"][-1]["init_args"]["max_skipped"] = 1
    config.write_text(yaml.safe_dump(content))
    line = error_of(fit.main, ["--config", str(config), "--run_dir", str(tmp_path / "stops")], capsys)
    assert "loss is 1000.0 at step 6 after 1 steps were left out; want one of at most 100" in line


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
