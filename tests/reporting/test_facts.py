"""What runs cost, how their configs differ, and where they ran."""

from pathlib import Path

from causalrn.reporting import facts
from causalrn.reporting.runs import find_runs


def test_costs_and_differences(runs: Path) -> None:
    found = [run for run in find_runs([runs]) if run.name.startswith("model")]
    cost = facts.cost_table(found)
    assert cost is not None
    assert [cell.text for cell in cost.cells[0]] == ["1,200", "12"]
    configs = facts.config_table(found)
    assert configs is not None
    assert configs.columns == ["length", "class_path"] or configs.columns == ["class_path", "length"]


def test_machines_are_named_once(runs: Path) -> None:
    found = find_runs([runs])
    ((machine, names),) = facts.machines(found)
    assert machine["accelerators"] == "NVIDIA H200"
    assert machine["git revision"] == "1" * 40
    assert len(names) == len(found)
