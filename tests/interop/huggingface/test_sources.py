"""The networks' file of an exported folder is made from the package's sources, and from nothing else."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from einops import rearrange

from causalrn.interop.huggingface import sources
from causalrn.interop.huggingface.sources import networks_source, rearrange_call

PATTERNS = [
    ((2, 4, 6), "b t (h d) -> b t h d", {"h": 3}),
    ((2, 4, 6, 5), "b t h d -> b h t d", {}),
    ((2, 4, 6, 5), "b h t d -> b t (h d)", {}),
    ((2, 4, 6), "b h i -> b i h 1", {}),
    ((2, 4, 12), "b t (three h d) -> three b t h d", {"three": 2, "h": 3}),
    ((2, 4, 6), "a b c -> (c a) b", {}),
]


@pytest.mark.parametrize(("shape", "pattern", "sizes"), PATTERNS, ids=str)
def test_patterns_become_the_same_reshapes(
    shape: tuple[int, ...], pattern: str, sizes: dict[str, int]
) -> None:
    x = torch.randn(shape)
    keywords = "".join(f", {name}={size}" for name, size in sizes.items())
    call = ast.parse(f"rearrange(x, {pattern!r}{keywords})", mode="eval").body
    assert isinstance(call, ast.Call)
    assert torch.equal(eval(ast.unparse(rearrange_call(call)), {"x": x}), rearrange(x, pattern, **sizes))


def definitions(text: str) -> dict[str, str]:
    """Every function and class of a module, methods among their class, as text without comments."""
    return {
        node.name: ast.unparse(node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_the_text_is_made_from_the_sources_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = networks_source()
    assert networks_source() == text
    # What changes in a module of the package changes in the file, in the same words.
    path = sources.source_file("causalrn.models.relation")
    changed = tmp_path / "relation.py"
    changed.write_text(path.read_text().replace("def combine(self, out", "def combine_all(self, out"))
    find = sources.source_file
    monkeypatch.setattr(
        sources, "source_file", lambda name: changed if name == "causalrn.models.relation" else find(name)
    )
    after = networks_source()
    assert "def combine_all(self, out" in after
    assert after.replace("def combine_all", "def combine") == text


def test_each_class_of_the_models_stands_there_as_in_its_module() -> None:
    found = definitions(networks_source())
    for name in ("LinearRelation", "LearnedPositions", "PairBias", "GatedMLP", "SoftmaxAttention"):
        module = sources.resolve("causalrn.models", name)[0]
        (mine,) = (
            node
            for node in ast.parse(sources.source_file(module).read_text()).body
            if isinstance(node, ast.ClassDef) and node.name == name
        )
        theirs = ast.parse(found[name]).body[0]
        assert isinstance(theirs, ast.ClassDef)
        methods = [node.name for node in mine.body if isinstance(node, ast.FunctionDef)]
        assert [node.name for node in theirs.body if isinstance(node, ast.FunctionDef)] == methods
        assert ast.get_docstring(theirs) == ast.get_docstring(mine)


def test_nothing_of_the_package_or_of_other_extras_is_imported() -> None:
    tree = ast.parse(networks_source())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    roots = {(name or "").split(".")[0] for name in names}
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


def test_the_file_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "networks_causalrn.py").write_text(networks_source())
    script = """
import sys
for name in ("causalrn", "datamodules", "einops", "jaxtyping"):
    sys.modules[name] = None
import networks_causalrn as n, torch
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
