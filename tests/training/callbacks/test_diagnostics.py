"""Diagnostics as a callback."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from causalrn import fit
from causalrn.training.callbacks import Diagnostics
from causalrn.training.loggers import read_metrics
from tests.test_fit import CONFIG, error_of


def test_the_callback_logs_at_every_validation(tmp_path: Path) -> None:
    callback = {"class_path": "causalrn.training.callbacks.Diagnostics", "init_args": {"n_sequences": 2}}
    config: dict[str, Any] = {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": [callback]}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    fit.main(["--config", str(tmp_path / "small.yaml"), "--run_dir", str(tmp_path / "run")])
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.csv") if "val/loss" in row]
    assert [row["step"] for row in rows] == [2, 5, 6]
    for row in rows[:2]:
        assert 0 < row["diagnostics/top_share/layer_00"] <= 1
        assert row["diagnostics/largest_exponent_max/layer_00"] <= math.sqrt(15)
    # The closing validation is no part of the training.
    assert not any(name.startswith("diagnostics/") for name in rows[2])


def test_the_callback_names_what_it_cannot_look_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    base = [
        "--config",
        str(tmp_path / "small.yaml"),
        "--trainer.callbacks+=causalrn.training.callbacks.Diagnostics",
    ]
    mixer = "--model.init_args.network.init_args.mixer"
    attention = [f"{mixer}=causalrn.models.SoftmaxAttention", f"{mixer}.init_args.d_model=16"]
    run_dir = ["--run_dir", str(tmp_path / "run")]
    assert "SoftmaxAttention" in error_of(fit.main, [*base, *attention, *run_dir], capsys)
    with pytest.raises(ValueError, match="n_positions must be at least 1: got 0"):
        Diagnostics(n_positions=0)
