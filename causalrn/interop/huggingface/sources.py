"""Makes the networks' files of an exported folder from the package's own sources: the same text with other imports.

The files lie next to one another, as transformers wants them. Compiled kernels stay with the package, so that each operator
takes its eager path.
"""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENTRY = HERE / "modeling_causalrn.py"
# The entry imports from these; a description may name every class of the models.
BEGINNING = ("causalrn.models", "causalrn.models.cache")
STAND_INS = "standins_causalrn"
REPLACED = {
    "einops": STAND_INS,
    "jaxtyping": STAND_INS,
    # The models need nothing else of this module.
    "causalrn.system": "datamodules.ranges",
}
# Modules of compiled kernels, by the words of their names.
COMPILED = {"cpu", "gpu", "native", "triton"}
INDEX = '''"""The networks of causalrn. Generated from the package's sources, as the files that it names: export again, do not edit."""

from typing import TYPE_CHECKING

from .causalrn_models import LanguageModel, PairBias, build
from .causalrn_models_cache import join_rows, select_rows

if TYPE_CHECKING:
    # By such lines transformers finds the files that belong together.
{files}
'''


def network_files() -> dict[str, str]:
    """Names and texts of the files, the same for every network."""
    files: dict[str, str] = {}
    waiting = list(BEGINNING)
    while waiting:
        module = waiting.pop()
        if file_name(module) not in files:
            files[file_name(module)], imported = rewrite(read_source(module))
            waiting += imported
    files[f"{STAND_INS}.py"] = (HERE / f"{STAND_INS}.py").read_text()
    lines = "\n".join(f"    from .{name.removesuffix('.py')} import *" for name in sorted(files))
    return {"networks_causalrn.py": INDEX.format(files=lines), **files}


def rewrite(text: str) -> tuple[str, list[str]]:
    """A module's text with imports of the files beside it, and the modules that it imports."""
    lines, imported = text.splitlines(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module in REPLACED or of_package(node.module)):
            module = REPLACED.get(node.module or "", node.module or "")
            new, found = import_lines(module, node.names)
            assert node.end_lineno is not None
            # The other lines keep their numbers.
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
            lines[node.lineno - 1] = "\n".join(" " * node.col_offset + line for line in new)
            imported += found
    text = "\n".join(lines) + "\n"
    # Both may be loaded in one process.
    return re.sub(
        r"\bcausalrn::|(?<=torch\.ops\.)causalrn\b",
        lambda m: m[0].replace("causalrn", "causalrn_export"),
        text,
    ), imported


def import_lines(module: str, names: list[ast.alias]) -> tuple[list[str], list[str]]:
    """The statements in place of `from module import names`, and the modules that they need."""
    modules = {
        alias.name: f"{module}.{alias.name}" for alias in names if source_path(f"{module}.{alias.name}")
    }
    lines = [
        f"from . import {flat_name(modules[alias.name])} as {alias.asname or alias.name}"
        for alias in names
        if alias.name in modules
    ]
    if others := [ast.unparse(alias) for alias in names if alias.name not in modules]:
        lines.append(f"from .{flat_name(module)} import {', '.join(others)}")
    needed = [*modules.values(), *([module] if others else [])]
    return lines, [name for name in needed if flat_name(name) != STAND_INS]


def flat_name(module: str) -> str:
    """The name of a module in the folder."""
    words = module.rpartition(".")[2].split("_")
    return STAND_INS if module == STAND_INS or COMPILED & set(words) else module.replace(".", "_")


def file_name(module: str) -> str:
    return f"{flat_name(module)}.py"


def of_package(module: str | None) -> bool:
    return (module or "").split(".")[0] in ("causalrn", "datamodules")


def source_path(module: str) -> Path | None:
    """The file of a module, or None where there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    return next((x for x in (path.with_suffix(".py"), path / "__init__.py") if x.is_file()), None)


def read_source(module: str) -> str:
    path = source_path(module)
    assert path is not None
    return path.read_text()
