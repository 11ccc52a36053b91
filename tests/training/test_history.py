"""What a run that was started more than once remembers of its starts, and what the report and the results say of them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from causalrn import fit
from causalrn.reporting import facts
from causalrn.reporting.runs import find_runs
from causalrn.training.callbacks import RunFolder
from causalrn.training.history import costs
from tests.faults import run_starts, start, write_config
from tests.test_fit import CONFIG


def read(run_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((run_dir / name).read_text())


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A run of 3 of 6 steps."""
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    args = ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--trainer.max_steps", "3"]
    fit.main(args)
    return tmp_path / "run"


def test_seconds_are_those_of_all_starts(half: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = read(half, "results.json")
    assert (first["starts"], first["seconds"]) == (1, first["seconds_of_last_start"])
    # As long as a training takes, so that the sum cannot be the last one's by rounding.
    environment = read(half, "environment.json")
    environment["starts"][0] |= {"seconds": 1000.0, "git_revision": "0" * 40}
    (half / "environment.json").write_text(json.dumps(environment))
    fit.main(["--resume", str(half), "--trainer.max_steps", "6"])
    results, environment = read(half, "results.json"), read(half, "environment.json")
    starts = environment["starts"]
    assert [(one["from_step"], one["step"]) for one in starts] == [(0, 3), (3, 6)]
    assert 0 < starts[1]["seconds"] < 1000
    assert results["seconds_of_last_start"] == starts[1]["seconds"]
    assert results["seconds"] == pytest.approx(1000 + starts[1]["seconds"])
    assert f"6 steps in {results['seconds']} s (2 starts, the last one " in capsys.readouterr().out
    # The newest start stands at the top, as readers of one start expect it.
    assert environment["command"] == starts[1]["command"]
    assert starts[1]["world_size"] == 1
    (run,) = find_runs([half])
    assert run.seconds == results["seconds"]
    assert run.notes[0].startswith("2 starts, of 1,000, ")
    assert run.notes[1].startswith(f"from start 2 on (step 3): git revision {'0' * 40} -> ")
    assert [names for _, names in facts.machines([run])] == [["run"], ["run"]]


def test_a_folder_of_a_former_version_is_extended(half: Path) -> None:
    environment, results = read(half, "environment.json"), read(half, "results.json")
    old = {name: value for name, value in environment.items() if name not in ("starts", "world_size")}
    old["packages"]["torch"] = "1.0"
    (half / "environment.json").write_text(json.dumps(old))
    former = {name: results[name] for name in ("step", "metrics")} | {"seconds": 500.0}
    (half / "results.json").write_text(json.dumps(former))
    (run,) = find_runs([half])
    assert (run.seconds, run.notes, len(facts.machines([run]))) == (500.0, [], 1)
    fit.main(["--resume", str(half), "--trainer.max_steps", "6"])
    starts = read(half, "environment.json")["starts"]
    assert [one["step"] for one in starts] == [3, 6]
    assert read(half, "results.json")["seconds"] == pytest.approx(500 + starts[1]["seconds"])
    (run,) = find_runs([half])
    assert "torch 1.0 -> " in run.notes[1]


def test_seconds_that_nobody_knows_are_said(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"python": "3.11"}')
    folder = RunFolder(tmp_path, {}, "fresh weights", time.monotonic())
    folder.begin({"python": "3.12"})
    folder.update(4)
    spent = costs(tmp_path)
    assert spent["starts"] == 2
    assert spent["starts_of_unknown_seconds"] == 1
    assert spent["seconds"] == spent["seconds_of_last_start"]
    # A kill of a former version may have left half a file.
    (tmp_path / "environment.json").write_text('{"python": "3.')
    folder.begin({"python": "3.12"})
    assert len(folder.starts) == 1


@pytest.mark.slow
def test_a_killed_and_a_preempted_start_are_remembered(tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "config.yaml", strategy="auto"))
    run_dir = tmp_path / "run"
    command = ["--config", config, "--run_dir", str(run_dir)]
    killed, preempted, last = run_starts(
        [
            start(command, ranks=1, fault={"kind": "SIGKILL", "rank": 0, "step": 6}),
            start(["--resume", str(run_dir)], ranks=1, fault={"kind": "SIGUSR1", "rank": 0, "step": 9}),
            start(command, ranks=1),
        ]
    )
    assert killed["codes"] == [-9], killed["output"]
    assert preempted["codes"] == [75], preempted["output"]
    assert last["codes"] == [0], last["output"]
    starts = read(run_dir, "environment.json")["starts"]
    # The killed one is known up to its checkpoint.
    assert [(one["from_step"], one["step"]) for one in starts] == [(0, 4), (4, 10), (10, 12)]
    assert all(one["seconds"] > 0 for one in starts)
    assert read(run_dir, "results.json")["seconds"] == pytest.approx(sum(one["seconds"] for one in starts))
