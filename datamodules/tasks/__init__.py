"""Synthetic tasks, each imported when it is asked for, and the DataModule that streams any of them."""

from typing import TYPE_CHECKING, Any

from datamodules import import_from

if TYPE_CHECKING:
    from datamodules.tasks.copying import Copy as Copy
    from datamodules.tasks.copying import RepetitiveCopy as RepetitiveCopy
    from datamodules.tasks.passkey import Passkey as Passkey
    from datamodules.tasks.recall import AssociativeRecall as AssociativeRecall
    from datamodules.tasks.recall import InductionHeads as InductionHeads
    from datamodules.tasks.recall import SelectiveCopying as SelectiveCopying
    from datamodules.tasks.string_tasks import DuplicatedNgrams as DuplicatedNgrams
    from datamodules.tasks.string_tasks import PrefixLookup as PrefixLookup
    from datamodules.tasks.string_tasks import Reverse as Reverse
    from datamodules.tasks.string_tasks import SuffixLookup as SuffixLookup

MODULES = {
    "datamodules.tasks.copying": ("Copy", "RepetitiveCopy"),
    "datamodules.tasks.passkey": ("Passkey",),
    "datamodules.tasks.recall": ("AssociativeRecall", "InductionHeads", "SelectiveCopying"),
    "datamodules.tasks.string_tasks": ("DuplicatedNgrams", "PrefixLookup", "Reverse", "SuffixLookup"),
}


def __getattr__(name: str) -> Any:
    return import_from(MODULES, __name__, name)
