"""Checks the shapes that annotations promise, in this process: at every call, arguments and results."""

from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import beartype

from tests import ROOT

PACKAGES = ("causalrn", "datamodules")


def install() -> None:
    """Comes before the first import of what is checked."""
    jaxtyping.install_import_hook(modules_with_shapes(), f"{__name__}.check_shapes")


def modules_with_shapes() -> list[str]:
    """Modules whose annotations name shapes; a Triton kernel, whose source is compiled, cannot be wrapped and has none."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    with_shapes = [path for path in paths if "from jaxtyping import" in path.read_text()]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in with_shapes]


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks those annotations of a function that name shapes; the others are pyright's, and a test's stand-in may be of
    another class.

    The import hook passes a copy of the signature made for this, whose annotations are its own.
    """
    hints = function.__annotations__
    shapes = {name: hint for name, hint in hints.items() if names_shape(hint)}
    function.__annotations__ = shapes
    return beartype(function) if shapes else function


def names_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(names_shape(inner) for inner in get_args(hint))
