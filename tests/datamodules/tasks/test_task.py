"""Every task: rows have the named width and ids, and depend on their key and index alone."""

import doctest
from typing import Any

import numpy as np
import pytest

from datamodules.stream import IGNORE_INDEX
from datamodules.tasks import copying, passkey, recall, string_tasks
from datamodules.tasks.task import Task
from tests.datamodules.tasks.rows import IDS, TASKS, length_for, name_of, rows_of


@pytest.mark.parametrize(
    "module", [copying, string_tasks, recall, passkey], ids=lambda module: module.__name__
)
def test_the_examples_in_the_docstrings(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted >= 3
    assert not results.failed


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_rows_have_the_width_and_the_ids_that_the_task_names(task: Task) -> None:
    for length in (length_for(task), 2 * length_for(task)):
        task.check_length(length)
        rows = rows_of(task, length)
        for name in ("tokens", "targets"):
            assert rows[name].shape == (len(IDS), task.positions(length))
            assert rows[name].dtype == np.int32
            assert rows[name].max() < task.vocab_size
        assert rows["tokens"].min() >= 0
        answered = rows["targets"] != IGNORE_INDEX
        assert answered.any(1).all()
        assert len({tuple(row) for row in rows["tokens"].tolist()}) > 1


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_a_sample_depends_on_its_key_and_id_only(task: Task) -> None:
    length = length_for(task)
    whole = rows_of(task, length)
    part = rows_of(task, length, np.array([31, 7]))
    for name, values in whole.items():
        assert np.array_equal(part[name], values[[31, 7]])
    other = task.rows(np.uint64(6), IDS, length)
    assert not np.array_equal(other["tokens"], whole["tokens"])
    assert task.evaluation_key("val", length) != task.evaluation_key("test", length)
