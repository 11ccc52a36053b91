"""Runs that are signalled in the middle and started again: bit for bit the run that nobody disturbed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from causalrn.training.checkpoint import read_checkpoint
from causalrn.training.loggers import read_metrics
from tests.faults import run_starts, start, write_config


def assert_same(one: Any, other: Any, place: str) -> None:
    """Equal plain values, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name in one:
            assert_same(one[name], other[name], f"{place}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}[{index}]")
    else:
        assert one == other, place


def losses(run_dir: Path) -> list[tuple[float, ...]]:
    names = ("step", "train/loss", "train/grad_norm", "val/loss", "val/character_accuracy")
    return [tuple(row.get(name, -1.0) for name in names) for row in read_metrics(run_dir / "metrics.csv")]


@pytest.mark.slow
def test_five_preemptions_change_nothing(tmp_path: Path) -> None:
    # The signals reach data workers too.
    config = str(write_config(tmp_path / "config.yaml", num_workers=1))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["--config", config, "--run_dir", str(broken)]
    faults = [
        # The ranks learn of it one step later: within an interval, ...
        {"kind": "SIGUSR1", "rank": 1, "step": 1},
        # ... before a validation, whose first batch is not taken, ...
        {"kind": "SIGTERM", "rank": 0, "step": 3},
        # ... in the middle of one, ...
        {"kind": "SIGUSR1", "rank": 1, "step": 4, "where": "validation"},
        {"kind": "SIGTERM", "rank": "all", "step": 6},
        # ... and in the last one, after which nothing is left to train.
        {"kind": "SIGUSR1", "rank": 0, "step": 12, "where": "validation"},
    ]
    starts = [start(command, fault=fault) for fault in faults] + [start(command)]
    first, *others = run_starts([start(["--config", config, "--run_dir", str(whole)]), *starts])
    assert first["codes"] == [0, 0], first["output"]
    *preempted, last = others
    for entry in preempted:
        # The other ranks leave without a complaint that a launcher would act on.
        assert entry["codes"] == [75, 0], entry["output"]
        assert "exit code 75, start again to continue" in entry["output"]
    assert last["codes"] == [0, 0], last["output"]
    one, other = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (whole, broken))
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "CopyDataModule"):
        assert_same(one[part], other[part], part)
    assert_same(one["preemption"]["random_states"], other["preemption"]["random_states"], "random_states")
    # The validation after the last step is the closing one's to repeat.
    assert losses(whole)[:-2] == losses(broken)[:-2]
    assert losses(whole)[-1] == losses(broken)[-1]


@pytest.mark.slow
def test_folders_of_sharded_weights_are_complete_or_absent(tmp_path: Path) -> None:
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    }
    config = str(
        write_config(
            tmp_path / "config.yaml", module="ShardedCopyModule", strategy=strategy, gradient_clip_val=None
        )
    )
    commands = {name: ["--config", config, "--run_dir", str(tmp_path / name)] for name in ("whole", "broken")}
    whole, signalled, killed, last = run_starts(
        [
            start(commands["whole"]),
            start(commands["broken"], fault={"kind": "SIGUSR1", "rank": 1, "step": 2}),
            start(commands["broken"], fault={"kind": "die in the next write", "rank": 0, "step": 5}),
            # Killed, not preempted: it must be asked for.
            start(["--resume", str(tmp_path / "broken")]),
        ]
    )
    assert whole["codes"] == [0, 0], whole["output"]
    assert signalled["codes"] == [75, 0], signalled["output"]
    assert killed["codes"][0] == -9, killed["output"]
    assert last["codes"] == [0, 0], last["output"]
    folders = [tmp_path / name / "checkpoints" for name in ("whole", "broken")]
    assert (folders[1] / "last.ckpt" / "sizes.json").is_file()
    assert not list(folders[1].glob("*.partial"))
    states = []
    for folder in folders:
        dcp_to_torch_save(folder / "last.ckpt", tmp_path / "weights.pt")
        states.append(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same(states[0], states[1], "sharded state")
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


@pytest.mark.slow
def test_ranks_that_begin_differently_are_told_so(tmp_path: Path) -> None:
    # As on two nodes whose run folders are not one.
    command = [
        "--config",
        str(write_config(tmp_path / "config.yaml")),
        "--run_dir",
        str(tmp_path / "run{rank}"),
    ]
    signalled, again = run_starts(
        [start(command, fault={"kind": "SIGUSR1", "rank": 1, "step": 1}), start(command)]
    )
    assert signalled["codes"] == [75, 0], signalled["output"]
    assert again["codes"] == [1, 1], again["output"]
    assert "error: rank 1 (on " in again["output"]
    assert ") begins with fresh weights and rank 0 (on " in again["output"]
    assert ") with preempted-step=3.ckpt: want --run_dir to name one folder" in again["output"]
