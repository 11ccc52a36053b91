"""What a DataModule says of its data, under the short paths that configs and checkpoints hold."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import datamodules
from datamodules import CopyDataModule, RecallDataModule, TaskDataModule, TextDataModule, tasks
from datamodules.base import StreamDataModule
from datamodules.errors import ShardError
from tests import ROOT

LETTERS = {"kind": "letters", "alphabet_size": 26}


@pytest.mark.parametrize(
    ("data", "vocab_size", "max_length", "tokenizer"),
    [
        (CopyDataModule(length=[3, 9], val_lengths=[20]), 29, 42, LETTERS),
        (CopyDataModule(vocab_size=40), 40, 34, {"kind": "numbers", "vocab_size": 40}),
        (TaskDataModule(tasks.RepetitiveCopy(), length=8), 29, 18, LETTERS),
        (TaskDataModule(tasks.Reverse(), length=8), 29, 18, {"kind": "numbers", "vocab_size": 29}),
        (RecallDataModule(tasks.AssociativeRecall()), 8192, 1024, {"kind": "numbers", "vocab_size": 8192}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_task_says_what_it_is(
    data: StreamDataModule, vocab_size: int, max_length: int, tokenizer: dict[str, Any]
) -> None:
    assert data.kind == "task"
    assert (data.vocab_size, data.max_length) == (vocab_size, max_length)
    assert data.describe_tokenizer() == tokenizer


def test_text_says_what_it_is(numbered_shards: Path) -> None:
    data = TextDataModule(str(numbered_shards), 8)
    assert data.kind == "text"
    assert (data.vocab_size, data.max_length) == (256, 8)
    assert data.describe_tokenizer() == {"kind": "bytes"}


def test_only_the_tokenizer_of_text_waits_for_shards(tmp_path: Path) -> None:
    data = TextDataModule(str(tmp_path / "shards"), 8, vocab_size=300)
    assert (data.kind, data.vocab_size, data.max_length) == ("text", 300, 8)
    with pytest.raises(ShardError, match="no manifest.json"):
        data.describe_tokenizer()


@pytest.mark.parametrize(("module", "task"), [("", ""), ("tasks.module.", "string_tasks.")])
def test_configs_may_name_classes_by_short_paths_or_by_their_modules(module: str, task: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("--data", type=StreamDataModule)
    given = [f"--data=datamodules.{module}TaskDataModule", f"--data.task=datamodules.tasks.{task}Reverse"]
    # Refused where there is no such class, or it is of another kind.
    data = parser.parse_args(given).data
    assert data.class_path.endswith(".TaskDataModule")
    assert data.init_args.task.init_args.alphabet_size == 26


def test_every_task_has_a_short_path() -> None:
    for name in [name for names in tasks.MODULES.values() for name in names]:
        assert issubclass(getattr(tasks, name), tasks.task.Task)
    with pytest.raises(AttributeError, match="module 'datamodules' has no attribute 'Nothing'"):
        _ = datamodules.Nothing


def test_preparing_shards_needs_neither_torch_nor_lightning() -> None:
    code = "import sys, datamodules.prepare.__main__; print([n for n in ('torch', 'lightning') if n in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
