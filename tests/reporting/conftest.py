"""Runs that reports are made of."""

from pathlib import Path

import pytest

from tests.reporting.run_folders import MIXERS, make_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs, as a sweep's: two models at two lengths, and an ablation."""
    folder = tmp_path / "runs"
    for model, mixer in MIXERS.items():
        for length in (8, 16):
            make_run(folder / f"model={model},length={length}", mixer, length, 1.0 if length == 8 else 0.25)
    for pre_norm in ("exact", "approx"):
        for activation in ("exp", "relu"):
            name = f"pre_norm={pre_norm},activation={activation}"
            share = 1.0 if pre_norm == "exact" and activation == "exp" else 0.5
            make_run(folder / name, "QuadraticRelation", 8, share, pre_norm=pre_norm, activation=activation)
    return folder
