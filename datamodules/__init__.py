"""Data of CausalRN: synthetic tasks, text shards and the exact, elastic order in which training reads them.

The DataModules are imported when they are asked for: the preparation of shards needs neither Lightning nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.tasks.copying import CopyDataModule as CopyDataModule
    from datamodules.tasks.module import TaskDataModule as TaskDataModule
    from datamodules.tasks.recall import RecallDataModule as RecallDataModule
    from datamodules.text import TextDataModule as TextDataModule

_MODULES = {
    "datamodules.text": ("TextDataModule",),
    "datamodules.tasks.module": ("TaskDataModule",),
    "datamodules.tasks.copying": ("CopyDataModule",),
    "datamodules.tasks.recall": ("RecallDataModule",),
}


def import_from(modules: dict[str, tuple[str, ...]], package: str, name: str) -> Any:
    """The object of a name, out of that of several modules which has it; what a package's `__getattr__` is made of."""
    for module, names in modules.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def __getattr__(name: str) -> Any:
    return import_from(_MODULES, __name__, name)
