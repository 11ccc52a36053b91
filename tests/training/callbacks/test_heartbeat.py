"""A run that hangs ends, and says which rank it waits for."""

import re
from pathlib import Path

import pytest

from causalrn.training.callbacks import Heartbeat
from causalrn.training.callbacks.heartbeat import EXIT_HUNG, Beat
from tests.faults import run_starts, start, write_config


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
