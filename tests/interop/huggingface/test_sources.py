"""The networks' files of an exported folder are made from the package's sources, and from nothing else."""

import ast
import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from causalrn.interop.huggingface import sources
from causalrn.interop.huggingface.sources import network_files


def test_only_imports_and_the_operators_names_differ_from_the_sources() -> None:
    files = network_files()
    assert network_files() == files
    for module in ("models.relation", "models.positions", "ops.quadratic.eager", "ops.dispatch"):
        before = sources.read_source(f"causalrn.{module}").splitlines()
        after = files[f"causalrn_{module.replace('.', '_')}.py"].splitlines()
        changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[2:].strip()]
        inside = False
        for line in changed:
            # Lines of an import over several lines end with its bracket.
            starts = "import " in line or "causalrn::" in line or "torch.ops.causalrn" in line
            starts = starts or "causalrn_export" in line
            assert starts or inside, line
            inside = line.endswith("import (") or (inside and line[2:] != ")")


def test_every_module_of_the_models_that_a_description_may_name_is_there() -> None:
    files = network_files()
    tree = ast.parse(sources.read_source("causalrn.models"))
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        assert f"{(node.module or '').replace('.', '_')}.py" in files
    # transformers copies what the first file names.
    named = {
        node.module
        for node in ast.walk(ast.parse(files["networks_causalrn.py"]))
        if isinstance(node, ast.ImportFrom)
    }
    assert {f"{name}.py" for name in named if name != "typing"} == files.keys() - {"networks_causalrn.py"}


def test_nothing_of_the_package_or_of_other_extras_is_imported() -> None:
    roots = set()
    for text in network_files().values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                roots.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
    assert roots - set(sys.stdlib_module_names) == {"torch"}


def test_the_wrapper_holds_no_mathematics() -> None:
    """Neither arithmetic nor a function of torch that is more than moving rows about."""
    tree = ast.parse(sources.ENTRY.read_text())
    operations = [node.op for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
    # Counting positions, and annotations such as Tensor | None.
    assert all(isinstance(operation, ast.Add | ast.Sub | ast.BitOr) for operation in operations)
    called = {
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("torch", "F", "nn")
    }
    assert called == {"ones", "arange", "cat"}


@pytest.mark.slow
def test_the_files_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, text in network_files().items():
        (tmp_path / "folder" / name).write_text(text)
    script = """
import sys
for name in ("causalrn", "datamodules", "einops", "jaxtyping"):
    sys.modules[name] = None
import folder.networks_causalrn, folder.causalrn_models as n, torch
for dtype in (torch.float32, torch.float64):
    network = n.LanguageModel(n.QuadraticRelation(8, 12), 11, 2, max_length=9).to(dtype)
    network(torch.zeros(1, 9, dtype=torch.int64)).sum().backward()
print(all(p.grad is not None for p in network.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout.strip() == "True", done.stderr
