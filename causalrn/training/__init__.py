"""Everything that knows Lightning: the module, the Trainer, checkpoints, loggers, callbacks and strategies."""

from typing import Any

# The modules of the public classes. They are imported when they are used: signals.py must run before Lightning is
# imported.
_HOMES = {
    "LanguageModelModule": "module",
    "Trainer": "trainer",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - names, each of which __getattr__ finds


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
