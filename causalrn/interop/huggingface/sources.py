"""Makes the networks' file of an exported folder from the package's own sources: their modules in one file of plain PyTorch.

The generator follows imports, from those of `modeling_causalrn.py` on. Compiled kernels stay with the package, so that each
operator takes its eager path; shapes stay as annotations that nobody evaluates; einops patterns become PyTorch's own calls.
"""

import ast
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("causalrn", "datamodules")
ENTRY = Path(__file__).parent / "modeling_causalrn.py"
# Modules of compiled kernels, by the words of their names.
COMPILED = {"cpu", "gpu", "native", "triton"}
# Operators of the file are no others than those of the package, but both may be loaded in one process.
OPERATORS = "causalrn_export"
HEADER = '''"""The networks of causalrn in plain PyTorch. Generated from the package's sources: do not edit, export again."""

from __future__ import annotations

{imports}


class Absent:
    """Stands for what finds the compiled kernels, which stay with the package: it finds none."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


absent = Absent()
'''


@dataclass
class Module:
    """One module of the package.

    Attributes:
        name: dotted.
        tree: its source.
        defined: names that its own statements bind.
        names: what stands in the file for each name that is bound to something of the package.
    """

    name: str
    tree: ast.Module
    defined: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def short_name(self) -> str:
        return "_".join(self.name.split(".")[-2:])


def networks_source() -> str:
    """The text of `networks_causalrn.py`, the same for every network."""
    modules: dict[str, Module] = {}
    begun: set[str] = set()
    # A description may name every class of the models.
    for path in (ENTRY, source_file("causalrn.models")):
        for node in package_imports(parse(path)):
            for alias in node.names:
                collect(resolve(node.module or "", alias.name)[0], modules, begun)
    counts = Counter(name for module in modules.values() for name in module.defined)
    for module in modules.values():
        flat = {name: name if counts[name] == 1 else f"{module.short_name}_{name}" for name in module.defined}
        module.names |= flat
    imports: set[str] = set()
    parts = []
    for module in modules.values():
        bind_imports(module, modules, imports)
        text = ast.unparse(ast.fix_missing_locations(Rewriter(module).visit(module.tree)))
        members = ", ".join(f"{name}={module.names[name]}" for name in sorted(module.defined))
        parts.append(f"# {module.name}\n\n{text}\n\n{module.short_name} = types.SimpleNamespace({members})\n")
    header = HEADER.format(imports="\n".join(sorted(imports | {"import types"})))
    return "\n\n".join([header, *parts])


def collect(name: str, modules: dict[str, Module], begun: set[str]) -> None:
    """Reads a module and, before it, those that it imports; `begun` holds those that are read already, or being read."""
    if name in begun or is_compiled(name):
        return
    begun.add(name)
    module = Module(name, ast.parse(source_file(name).read_text()))
    module.defined = {bound for node in module.tree.body for bound in bound_names(node)}
    for node in package_imports(module.tree):
        for alias in node.names:
            collect(resolve(node.module or "", alias.name)[0], modules, begun)
    modules[name] = module


def resolve(module_name: str, name: str) -> tuple[str, str | None]:
    """The module that defines a name, and the name there; None for the name where it is a module itself."""
    if is_compiled(module_name):
        return module_name, name
    tree = parse(source_file(module_name))
    if any(name in bound_names(node) for node in tree.body):
        return module_name, name
    for node in package_imports(tree):
        for alias in node.names:
            if name == (alias.asname or alias.name):
                return resolve(node.module or "", alias.name)
    return f"{module_name}.{name}", None


def package_imports(tree: ast.AST) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and of_package(node)]


def of_package(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES


def is_compiled(name: str) -> bool:
    return bool(COMPILED & set(name.split(".")[-1].split("_")))


@cache
def parse(path: Path) -> ast.Module:
    """A module as it stands in the package; what is rewritten is parsed anew."""
    return ast.parse(path.read_text())


def source_file(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def bound_names(node: ast.AST) -> set[str]:
    """Names that a statement of a module binds, those of imports left out."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {
        part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)
    }


def bind_imports(module: Module, modules: dict[str, Module], imports: set[str]) -> None:
    """Adds what stands for the names that a module imports, and the lines of those from outside the package."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            imports.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and not of_package(node):
            if node.module == "importlib.util":
                module.names["find_spec"] = "absent.find_spec"
            elif node.module not in ("jaxtyping", "einops", "__future__"):
                imports |= {f"from {node.module} import {ast.unparse(alias)}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                where, name = resolve(node.module or "", alias.name)
                module.names[alias.asname or alias.name] = name_in_file(modules.get(where), name)


def name_in_file(module: Module | None, name: str | None) -> str:
    if module is None:
        return "absent"
    return module.short_name if name is None else module.names[name]


class Rewriter(ast.NodeTransformer):
    """A module's statements as they stand in the file: other names, no imports of the package, no einops."""

    def __init__(self, module: Module) -> None:
        self.names = module.names
        # Names of the functions around, innermost last.
        self.locals: list[set[str]] = []

    def visit_Module(self, node: ast.Module) -> ast.Module:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        self.generic_visit(node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        # Nothing is left of imports for annotations.
        return node if node.body else None

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.stmt] | None:
        if not self.locals or not of_package(node):
            return None
        local = [alias.asname or alias.name for alias in node.names]
        return [ast.parse(f"{name} = {self.names[name]}").body[0] for name in local]

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if not self.locals:
            node.name = self.names[node.name]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = [self.visit(decorator) for decorator in node.decorator_list]
        self.visit(node.args)
        # Methods keep their names.
        if not self.locals and node.col_offset == 0:
            node.name = self.names[node.name]
        self.locals.append(local_names(node))
        node.body = [part for old in node.body for part in as_list(self.visit(old))]
        self.locals.pop()
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self.locals.append(
            {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        )
        self.generic_visit(node)
        self.locals.pop()
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if any(node.id in names for names in self.locals) or node.id not in self.names:
            return node
        target = ast.parse(self.names[node.id], mode="eval").body
        assert isinstance(target, ast.Name | ast.Attribute)
        target.ctx = node.ctx
        return target

    def visit_Global(self, node: ast.Global) -> ast.AST:
        return ast.Global([self.names.get(name, name) for name in node.names])

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value.startswith("causalrn::"):
            return ast.Constant(node.value.replace("causalrn::", f"{OPERATORS}::", 1))
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "causalrn" and ast.unparse(node.value) == "torch.ops":
            node.attr = OPERATORS
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "rearrange":
            return rearrange_call(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "custom_op":
            # The eager path serves every device.
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "device_types"]
        return node


def as_list(found: ast.AST | list[ast.AST] | None) -> list:
    return found if isinstance(found, list) else [] if found is None else [found]


def local_names(function: ast.FunctionDef) -> set[str]:
    """Names that a function binds; those that it declares global are none of them."""
    found = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    declared: set[str] = set()
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Global):
                declared |= set(node.names)
    return found - declared


def rearrange_call(node: ast.Call) -> ast.AST:
    """`einops.rearrange` with a plain pattern as calls of unflatten, permute, unsqueeze and flatten."""
    pattern = node.args[1]
    assert isinstance(pattern, ast.Constant)
    sizes = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    before, after = (
        [(group or name).split() for group, name in re.findall(r"\(([^)]*)\)|(\S+)", side)]
        for side in str(pattern.value).split("->")
    )
    calls, dim = "", 0
    for group in before:
        if len(group) > 1:
            calls += f".unflatten({dim}, ({', '.join(sizes.get(axis, '-1') for axis in group)}))"
        dim += len(group)
    axes = [axis for group in before for axis in group]
    order = [axes.index(axis) for group in after for axis in group if axis != "1"]
    if order != sorted(order):
        calls += f".permute({', '.join(map(str, order))})"
    for dim, group in enumerate(after):
        if group == ["1"]:
            calls += f".unsqueeze({dim})"
        elif len(group) > 1:
            calls += f".flatten({dim}, {dim + len(group) - 1})"
    return ast.parse(f"({ast.unparse(node.args[0])}){calls}", mode="eval").body
