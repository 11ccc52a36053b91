"""A sweep file says its axes and points; mistakes in it are found before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from causalrn import sweep
from causalrn.sweeps.grid import read_sweep
from causalrn.sweeps.points import plan_points
from tests.sweeps.sweep_files import NETWORK, RATE, STEPS, names
from tests.test_fit import error_of


def test_a_grid_is_the_product_of_its_axes_without_what_is_excluded(write, tmp_path: Path) -> None:
    (tmp_path / "overlay.yaml").write_text("trainer: {log_every_n_steps: 2}\n")
    path = write(
        {
            "set": {STEPS: 4},
            "grid": {
                "size": {"small": {}, "wide": {"configs": ["overlay.yaml"], f"{NETWORK}.n_layers": 2}},
                RATE: [1e-3, 1e-4],
                "seed_everything": [1],
            },
            "exclude": [{"size": "wide", "learning_rate": 0.0001}],
        }
    )
    assert names(path) == [
        "size=small,learning_rate=0.001,seed_everything=1",
        "size=small,learning_rate=0.0001,seed_everything=1",
        "size=wide,learning_rate=0.001,seed_everything=1",
    ]
    plan = plan_points(read_sweep(path))[2]
    assert plan.settings["trainer.log_every_n_steps"] == 2
    assert plan.settings[f"{NETWORK}.n_layers"] == 2
    assert (plan.steps, plan.sequences, plan.positions) == (4, 4, 18)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("grid: [", "no YAML"),
        ("{}", "has no grid"),
        ({"gird": {}, "grid": {STEPS: [1]}}, "unknown keys gird"),
        ({"grid": {STEPS: []}}, "axis trainer.max_steps is []"),
        ({"grid": {STEPS: [1, 1]}}, "has 1 more than once"),
        ({"grid": {"model": {"a": {"configs": "no.yaml"}}}}, "no.yaml"),
        ({"grid": {STEPS: [1]}, "exclude": [{"max_steps": 2}]}, "max_steps=2"),
        ({"grid": {STEPS: [1]}, "exclude": [{"max_steps": 1}]}, "leaves no point"),
        ({"grid": {STEPS: [1]}, "goal": {"metric": "val/loss"}}, "at_least"),
        (
            {"grid": {STEPS: [1]}, "goal": {"metric": "val/los", "at_least": 1}},
            "no metric val/los; want one of val/loss",
        ),
        ({"grid": {"trainer.max_stepz": [1]}}, "max_stepz"),
        ({"grid": {"max_steps": [1]}}, "max_steps"),
        ({"grid": {STEPS: ["many"]}}, "many"),
        (
            {"grid": {f"{NETWORK}.mixer.init_args.n_heads": [1, 5]}},
            "point n_heads=5: d_hidden must be divisible",
        ),
        ({"grid": {"data.init_args.length": [8, 9]}}, "point length=9: a row of the data has 20 positions"),
        ({"grid": {"data.init_args.vocab_size": [30]}}, "got 29 (model) and 30"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_found_before_anything_starts(
    content: Any, wanted: str, write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(content)
    assert wanted in error_of(sweep.main, ["--config", str(path)], capsys)
    assert not (tmp_path / "out").exists()
