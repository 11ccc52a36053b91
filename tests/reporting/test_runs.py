"""Run folders are read as far as they are whole."""

from pathlib import Path

import pytest
import yaml

from causalrn import report
from causalrn.reporting import views
from causalrn.reporting.runs import find_runs
from tests.reporting.run_folders import make_run
from tests.test_fit import CONFIG


def test_models_are_named_by_the_mixer_and_its_convolution(tmp_path: Path) -> None:
    settings = {"d_model": 16, "activation": "relu"}
    quadratic = {"class_path": "causalrn.models.QuadraticRelation", "init_args": settings}
    # A short convolution was a mixer around the mixer once.
    make_run(tmp_path / "former", "ShortConvolution", 8, 1.0, mixer=quadratic)
    make_run(tmp_path / "plain", "QuadraticRelation", 8, 1.0)
    runs = find_runs([tmp_path])
    assert {run.name: run.model for run in runs} == {
        "former": "Quadratic CausalRN behind ShortConvolution",
        "plain": "Quadratic CausalRN",
    }
    # An ablation compares relations that read the same.
    assert views.ablation_maps(runs) == []


@pytest.mark.slow
def test_what_is_not_whole_is_said_and_shown_as_far_as_it_goes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = make_run(runs / "torn", "LinearRelation", 8, 0.7)
    path = torn / "metrics.csv"
    path.write_text(path.read_text() + "400,0.0")
    (torn / "results.json").write_text('{"step": 4')
    (torn / "config.yaml").write_text("{data: [")
    bare = runs / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (runs / "garbage").mkdir()
    (runs / "garbage" / "metrics.csv").write_text("step,train/loss\n1,0.5\nhello,world\n")
    report.main([str(runs), "--output", str(tmp_path / "report.html")])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    for wanted in (
        "torn: metrics.csv has a torn last line, which is left out",
        "torn: results.json is half-written",
        "torn: config.yaml is half-written",
        "torn: unfinished: last logged at step 399",
        "bare: metrics.csv is missing",
        "bare: environment.json is missing",
        "garbage: metrics.csv cannot be read",
    ):
        assert any(wanted in note for note in notes), wanted
    assert "torn last line" in (tmp_path / "report.html").read_text()
