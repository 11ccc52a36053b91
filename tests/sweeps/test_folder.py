"""The folder of a sweep knows the state of each point."""

from pathlib import Path

from causalrn.sweeps.folder import SweepFolder
from causalrn.sweeps.grid import read_sweep
from causalrn.sweeps.table import collect


def test_states_of_a_point(write, tmp_path: Path) -> None:
    path = write({"grid": {"seed_everything": [1]}, "goal": {"metric": "val/loss", "at_least": 0.1}})
    (point,) = read_sweep(path).points
    folder = SweepFolder(tmp_path / "out")
    folder.prepare()
    run_dir = folder.run_dir(point)
    assert folder.state(point) == "new"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("{}")
    assert folder.state(point) == "half-written"
    # Nothing is lost: what cannot resume is kept aside.
    assert folder.arguments(point)[-1] == f"--run_dir={run_dir}"
    assert not run_dir.exists()
    assert [kept.name for kept in (folder.notes / "abandoned").iterdir()] == [f"0-{point.name}"]
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "last.ckpt").write_bytes(b"")
    (run_dir / "results.json").write_text('{"step": 4, "metr')
    assert folder.state(point) == "unfinished"
    assert folder.arguments(point) == [f"--resume={run_dir}"]
    (run_dir / "results.json").write_text('{"step": 4, "metrics": {}}')
    assert folder.state(point) == "finished"
    # A file that is no metrics costs its row's goal, not the table.
    (run_dir / "metrics.csv").write_text("step,val/loss\nhello,world\n")
    (row,) = collect(read_sweep(path), folder)
    assert row["note"].startswith("metrics.csv cannot be read")
    (run_dir / "metrics.csv").write_text("step,val/loss\n3,0.5\n4,0.")
    (row,) = collect(read_sweep(path), folder)
    assert row["goal_step"] == 4
