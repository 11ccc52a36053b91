"""Imports point down: each layer of the package may name only the layers below it, and datamodules none of it."""

import ast
from pathlib import Path

from tests import ROOT

# The commands, one file per thing one runs, may use everything; every file not listed here is one of them.
LAYERS = [
    {"ops", "allocator", "benchmarking", "extras", "memory", "peaks", "ranges", "run_lock", "signals"},
    {"models"},
    {
        *("metrics", "diagnostics", "length_ladder", "length_report", "loggers", "tables", "trackers"),
        *("changes", "checkpoint", "checkpoint_io", "config_files", "data_folders", "decoding"),
        *("random_state", "resume", "sharded", "starts"),
    },
    {"lit_module", "callbacks", "strategies", "trainer", "trainer_settings"},
    {"cli", "config_errors"},
]


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def layer_of(module: str) -> int:
    return next((i for i, layer in enumerate(LAYERS) if module in layer), len(LAYERS))


def test_imports_point_down() -> None:
    for path in (ROOT / "causalrn").rglob("*.py"):
        module = path.relative_to(ROOT / "causalrn").with_suffix("").parts[0]
        for name in imported(path):
            package, _, rest = name.partition(".")
            if package == "causalrn" and rest and layer_of(module) < len(LAYERS):
                assert layer_of(rest.split(".")[0]) <= layer_of(module), f"{path} imports {name}"
            if package == "datamodules":
                assert layer_of(module) == len(LAYERS), f"{path} imports {name}"


def test_datamodules_stand_alone() -> None:
    for path in (ROOT / "datamodules").rglob("*.py"):
        assert not any(name.split(".")[0] == "causalrn" for name in imported(path)), path


def test_networks_know_nothing_of_lightning() -> None:
    for folder in ("ops", "models"):
        for path in (ROOT / "causalrn" / folder).rglob("*.py"):
            assert not any("lightning" in name for name in imported(path)), path
