"""Imports point down: the folder of a file says its layer, and a file names only its own layer and those below it."""

import ast
from pathlib import Path

import pytest

from causalrn.__main__ import VERBS
from tests import ROOT

# The folders and files of causalrn/ from the bottom up. The verbs, one file each, stand above them all.
LAYERS = (
    ("system", "ops"),
    ("models",),
    ("evaluation",),
    ("training",),
    ("interop", "cli"),
    ("reporting", "sweeps"),
)
PLACES = {place: layer for layer, places in enumerate(LAYERS) for place in places}
VERB_FILES = {
    module.removeprefix("causalrn.") for module, _ in VERBS.values() if module.startswith("causalrn.")
}
VERB = len(LAYERS)
# A task of a sweep is a run of fit, in the same process so that the scheduler's signals reach it.
RUNS_FIT = "sweep"
# The lowest layer that may name datamodules, which know nothing of causalrn.
DATA_FROM = PLACES["evaluation"]
# What the machine offers both packages has one home each.
SHARED = {"datamodules.errors", "datamodules.files", "datamodules.ranges"}


def imported(path: Path) -> set[str]:
    """The modules that a file names, also within functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def place_of(name: str) -> str:
    """The folder or file of causalrn/ that a dotted name lies in."""
    return name.split(".")[1] if "." in name else ""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_every_file_has_a_layer() -> None:
    places = {path.relative_to(ROOT / "causalrn").with_suffix("").parts[0] for path in sources("causalrn")}
    assert places == {*PLACES, *VERB_FILES, "__init__", "__main__"}


@pytest.mark.parametrize("path", sources("causalrn"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = path.relative_to(ROOT / "causalrn").with_suffix("").parts[0]
    layer = PLACES.get(here, VERB)
    for name in imported(path):
        place = place_of(name)
        if name.startswith("causalrn.") and place in {*PLACES, *VERB_FILES} and place != here:
            assert PLACES.get(place, VERB) <= layer, f"{path} imports {name}"
            assert place not in VERB_FILES or (here, place) == (RUNS_FIT, "fit"), f"{path} imports {name}"
        if name.startswith("datamodules.") and here != "system":
            assert layer >= DATA_FROM, f"{path} imports {name}"
        if name.startswith("datamodules.") and here == "system":
            assert any(name.startswith(shared) for shared in SHARED), f"{path} imports {name}"
        assert name.split(".")[0] not in ("benchmarks", "launch", "tests"), f"{path} imports {name}"


def test_datamodules_stand_alone() -> None:
    for path in sources("datamodules"):
        outside = {name.split(".")[0] for name in imported(path)} & {
            "causalrn",
            "benchmarks",
            "launch",
            "tests",
        }
        assert not outside, path


def test_networks_know_nothing_of_lightning() -> None:
    for folder in ("ops", "models", "evaluation"):
        for path in sources(f"causalrn/{folder}"):
            assert not any("lightning" in name for name in imported(path)), path
