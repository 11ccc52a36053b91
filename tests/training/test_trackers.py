"""Every logger: a run that is resumed, even from before where it was killed, stays one run without a step twice."""

import importlib
import json
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from causalrn import fit
from causalrn.training.loggers import read_metrics
from causalrn.training.trackers import TrackerNotes
from tests import ROOT
from tests.test_fit import CONFIG, config, error_of

# A fixture of the tests of fit.
__all__ = ["config"]
Logged = dict[str, list[int]]


def train_in_pieces(config: Path, run_dir: Path, overlay: str) -> None:
    """3 steps, 3 more, and once more from the checkpoint of step 3, as a process that was killed before it saved."""
    fit.main(
        ["--config", str(config), "--config", overlay, "--run_dir", str(run_dir), "--trainer.max_steps", "3"]
    )
    folder = run_dir / "checkpoints"
    kept = shutil.copy(next(folder.glob("*step=3.ckpt")), run_dir / "kept")
    fit.main(["--resume", str(run_dir), "--trainer.max_steps", "6"])
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    shutil.move(kept, folder / "kept.ckpt")
    fit.main(["--resume", str(run_dir), "--trainer.max_steps", "6"])


def expected(run_dir: Path) -> Logged:
    """What metrics.csv holds, which other tests hold true."""
    rows = read_metrics(run_dir / "metrics.csv")
    names = {name for row in rows for name in row} - {"step"}
    return {name: [int(row["step"]) for row in rows if name in row] for name in names}


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    content = path.read_bytes()
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        # 1 is a whole record, 2 to 4 are its first, middle and last part.
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_runs(run_dir: Path) -> tuple[set[str], Logged]:
    """Run ids and steps of all offline files of a run folder."""
    protocol: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    ids: set[str] = set()
    steps: Logged = {}
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = protocol.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {
                    ".".join(item.nested_key) or item.key: item.value_json for item in record.history.item
                }
                for name in items:
                    if name.startswith(("train/", "val/")):
                        steps.setdefault(name, []).append(int(items["trainer/global_step"]))
    return ids, steps


@pytest.mark.slow
def test_tensorboard_and_wandb_continue_one_run(config: Path, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    train_in_pieces(config, run_dir, str(ROOT / "configs" / "logger" / "wandb.yaml"))
    wandb.finish()
    wanted = expected(run_dir)
    assert wanted["train/loss"] == [0, 1, 2, 3, 4, 5]
    events = EventAccumulator(str(run_dir)).Reload()
    for name in ("train/loss", "val/loss"):
        assert [event.step for event in events.Scalars(name)] == wanted[name]
    ids, steps = wandb_runs(run_dir)
    assert ids == {json.loads((run_dir / "wandb.json").read_text())["run_id"]}
    assert len(steps) >= 5
    for name, found in steps.items():
        assert max(Counter(found).values()) == 1, name
        # What metrics.csv holds; the closing validation of the first piece, at step 3, it has given up since.
        assert set(wanted[name]) <= set(found), name
        assert set(found) - set(wanted[name]) <= {3}


@pytest.mark.slow
# MLflow's own use of its packages.
@pytest.mark.filterwarnings("default")
def test_mlflow_continues_one_run(config: Path, tmp_path: Path) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    run_dir = tmp_path / "run"
    train_in_pieces(config, run_dir, str(ROOT / "configs" / "logger" / "mlflow.yaml"))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "causalrn"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    for name in ("train/loss", "val/loss"):
        steps = sorted(metric.step for metric in client.get_metric_history(run.info.run_id, name))
        assert max(Counter(steps).values()) == 1
        assert set(expected(run_dir)[name]) <= set(steps)


def test_notes_of_a_tracker(tmp_path: Path) -> None:
    notes = TrackerNotes(tmp_path / "run" / "wandb.json")
    assert notes.unsent({"a": 1.0}, 4) == {"a": 1.0}
    # Training and validation log apart.
    assert notes.unsent({"b": 1.0}, 4) == {"b": 1.0}
    notes.save()
    again = TrackerNotes(notes.path)
    assert again.unsent({"a": 1.0, "b": 1.0, "c": 1.0}, 4) == {"c": 1.0}
    assert again.unsent({"a": 1.0}, 5) == {"a": 1.0}
    notes.path.write_text('{"run_id": "a')
    with pytest.raises(ValueError, match="half-written"):
        TrackerNotes(notes.path)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(
    name: str,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    overlay = str(ROOT / "configs" / "logger" / f"{name}.yaml")
    args = ["--config", str(config), "--config", overlay, "--run_dir", str(tmp_path / "run")]
    assert f"pip install 'causalrn[{name}]'" in error_of(fit.main, args, capsys)
    assert CONFIG
