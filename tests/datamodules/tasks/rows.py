"""Every synthetic task, and rows of it."""

from typing import Any

import numpy as np

from datamodules.tasks import InductionHeads, SelectiveCopying
from datamodules.tasks.copying import Copy, RepetitiveCopy
from datamodules.tasks.passkey import Passkey
from datamodules.tasks.recall import AssociativeRecall
from datamodules.tasks.string_tasks import DuplicatedNgrams, PrefixLookup, Reverse, SuffixLookup
from datamodules.tasks.task import Task

TASKS = [
    Copy(),
    RepetitiveCopy(),
    Reverse(),
    DuplicatedNgrams(n_gram=3),
    PrefixLookup(answer_length=4),
    SuffixLookup(answer_length=4),
    AssociativeRecall(vocab_size=64),
    SelectiveCopying(letters=5),
    InductionHeads(),
    Passkey(),
]
IDS = np.arange(40)


def length_for(task: Task) -> int:
    return 130 if isinstance(task, Passkey) else 24


def name_of(value: Any) -> str:
    return type(value).__name__ if isinstance(value, Task) else ""


def rows_of(task: Task, length: int, ids: Any = IDS) -> dict[str, Any]:
    return task.rows(np.uint64(5), ids, length)
