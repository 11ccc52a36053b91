"""The tables of a report say what the runs say."""

from pathlib import Path

from causalrn.reporting import views
from causalrn.reporting.runs import find_runs


def test_tables_say_what_the_runs_say(runs: Path) -> None:
    found = [run for run in find_runs([runs]) if run.name.startswith("model")]
    accuracy, steps = views.copying_tables(found)
    assert accuracy.rows == ["Quadratic CausalRN", "Transformer"]
    assert accuracy.columns == ["S = 8", "S = 16"]
    assert [[cell.share for cell in row] for row in accuracy.cells] == [[1.0, 0.25], [1.0, 0.25]]
    # The row of step 199 was written after 200 steps, and there the share is 199 / 200.
    assert [[cell.text for cell in row] for row in steps.cells] == [["200", "> 399"], ["200", "> 399"]]
    (ablation,) = views.ablation_maps([run for run in find_runs([runs]) if "pre_norm" in run.name])
    assert (ablation.rows, ablation.columns) == (["exact pre-norm", "approx pre-norm"], ["exp", "relu"])
    assert [[cell.share for cell in row] for row in ablation.cells] == [[1.0, 0.5], [0.5, 0.5]]
