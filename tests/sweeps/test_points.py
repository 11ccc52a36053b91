"""Every point is checked before anything starts, and what it trains on is counted."""

from pathlib import Path

import pytest

from causalrn.sweeps.grid import read_sweep
from causalrn.sweeps.points import plan_points
from tests import ROOT
from tests.sweeps.sweep_files import STEPS, run


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_sweep_is_valid(path: Path) -> None:
    found = read_sweep(path)
    assert len(plan_points(found)) == len(found.points) >= 4


def test_dry_run_prints_points_and_what_they_train_on(
    write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(write({"grid": {STEPS: [2, 30]}}), "--dry-run")
    printed = capsys.readouterr().out
    # 30 steps of 4 rows of 18 tokens.
    for word in ("max_steps=2 ", "max_steps=30", "2,160", "2 of 2 points to run"):
        assert word in printed
    assert not (tmp_path / "out").exists()
