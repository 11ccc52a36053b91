"""A method that subclasses have to define is refused when the object is made, not when the method is called."""

import importlib
import inspect
from pathlib import Path

import pytest

from tests import ROOT

SOURCES = [
    path for package in ("causalrn", "datamodules", "launch") for path in (ROOT / package).rglob("*.py")
]
MARKED = sorted(path for path in SOURCES if "@abstractmethod" in path.read_text())


@pytest.mark.parametrize("path", MARKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_abstract_methods_keep_a_class_from_being_made(path: Path) -> None:
    if path.parent.name == "huggingface":
        pytest.importorskip("transformers", reason="the extra huggingface is not installed")
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    declaring = [
        found
        for _, found in inspect.getmembers(module, inspect.isclass)
        if found.__module__ == module.__name__
        and any(getattr(value, "__isabstractmethod__", False) for value in vars(found).values())
    ]
    assert declaring
    for found in declaring:
        assert inspect.isabstract(found), (
            f"{found.__name__} has abstract methods, and no metaclass that minds them"
        )


def test_nothing_waits_for_its_call_to_say_that_it_is_not_there() -> None:
    assert not [str(path) for path in SOURCES if "raise NotImplementedError" in path.read_text()]
