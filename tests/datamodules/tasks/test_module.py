"""The synthetic tasks: their rows are what they say, samples are functions of their index, mistakes get one line."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.order import random_subset, random_uniform
from datamodules.stream import IGNORE_INDEX
from datamodules.tasks import InductionHeads, SelectiveCopying
from datamodules.tasks.copying import Copy, RepetitiveCopy
from datamodules.tasks.module import Setting, TaskDataModule, TaskStream
from datamodules.tasks.passkey import Passkey
from datamodules.tasks.recall import AssociativeRecall, RecallDataModule
from datamodules.tasks.string_tasks import DuplicatedNgrams, PrefixLookup, Reverse, SuffixLookup
from datamodules.tasks.strings import EOS, counters
from datamodules.tasks.task import Task
from tests.datamodules.tasks.rows import TASKS, length_for, name_of


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_training_resumes_exactly(task: Task) -> None:
    def data() -> TaskDataModule:
        length = length_for(task)
        return TaskDataModule(task, batch_size=4, length=[length, length + 6], batches_per_epoch=5)

    unbroken = list(data().train_dataloader())
    first = data()
    for batch, _ in zip(first.train_dataloader(), range(2), strict=False):
        assert batch["tokens"].dtype == torch.int64
    second = data()
    second.load_state_dict({**first.state_dict(), "next_index": 8})
    for ours, theirs in zip(second.train_dataloader(), unbroken[2:], strict=False):
        assert torch.equal(ours["tokens"], theirs["tokens"])
        assert torch.equal(ours["targets"], theirs["targets"])


def test_random_draws_are_uniform() -> None:
    subsets = random_subset(np.uint64(1), counters(np.arange(4000), 6), 3)
    assert all(len(set(row)) == 3 for row in subsets.tolist())
    for column in subsets.T:
        assert np.bincount(column, minlength=6) / 4000 == pytest.approx(np.full(6, 1 / 6), abs=0.03)
    uniform = random_uniform(np.uint64(1), np.arange(4000))
    assert 0 < uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1


# The first 8 rows of each validation set. A change would make results incomparable with those of other users.
PINNED = {
    "copy": "0d1373a20e34c40e",
    "repetitive_copy": "9398a569b3b88f91",
    "reverse": "7b5dffb90c9805df",
    "duplicated_ngrams": "2f9fc8b558951040",
    "prefix_lookup": "e33103558b6262d2",
    "suffix_lookup": "7634566074d072ce",
    "associative_recall": "ebf31c9461696bb6",
    "selective_copying": "50496676f4558091",
    "induction_heads": "90ddcc1cad3f2b89",
    "passkey": "851146670c18b5ae",
}


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_evaluation_sets_are_pinned(task: Task) -> None:
    rows = task.rows(task.evaluation_key("val", length_for(task)), np.arange(8), length_for(task))
    assert hashlib.sha256(rows["tokens"].astype("<i8").tobytes()).hexdigest()[:16] == PINNED[task.name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copy(0), "alphabet_size must be at least 1: got 0"),
        (lambda: RepetitiveCopy(fewest_letters=0), r"fewest_letters must be in \[1, 26\]: got 0"),
        (lambda: RepetitiveCopy(longest_ending=-1), "longest_ending must be at least 0: got -1"),
        (lambda: RepetitiveCopy(4, fewest_letters=5), r"fewest_letters must be in \[1, 4\]: got 5"),
        (lambda: DuplicatedNgrams(n_gram=0), "n_gram must be at least 1: got 0"),
        (lambda: PrefixLookup(answer_length=0), "answer_length must be at least 1: got 0"),
        (lambda: SuffixLookup(n_gram=20), "at most 2[*][*]62, got alphabet_size=26, n_gram=20"),
        (lambda: AssociativeRecall(vocab_size=6), "vocab_size must be at least 8: got 6"),
        (lambda: AssociativeRecall(pairs=0), "pairs must be at least 1: got 0"),
        (lambda: SelectiveCopying(letters=0), "letters must be at least 1: got 0"),
        (lambda: Passkey(digits=0), "digits must be at least 1: got 0"),
        (lambda: TaskDataModule(Reverse(), length=[9, 3]), r"\[shortest, longest\], got \[9, 3\]"),
        (lambda: TaskDataModule(Reverse(), length=0), r"length must be in \[1, 16777216\), got 0"),
        (lambda: TaskDataModule(Reverse(), val_lengths=[]), "val_lengths is empty"),
        (lambda: TaskDataModule(Reverse(), val_lengths=[4, -1]), r"got -1"),
        (lambda: TaskDataModule(Reverse(), val_samples=0), "val_samples must be at least 1: got 0"),
        (lambda: TaskDataModule(DuplicatedNgrams(4), length=7), r"at least 8 \(two n-grams of 4 letters\), got 7"),
        (lambda: TaskDataModule(PrefixLookup(3, 8), length=10), "at least 11 .3 letters to look up and 8 to answer"),
        (lambda: TaskDataModule(SuffixLookup(2, 1, 4), length=17), "at most 16, the number of 2-grams of 4 letters"),
        (lambda: TaskDataModule(SelectiveCopying(16), length=15), "at least 16 .16 letters to say again., got 15"),
        (lambda: TaskDataModule(InductionHeads(), length=1), "at least 2 .the trigger and the letter after it"),
        (lambda: TaskDataModule(Passkey(), length=20), "at least 74 .bytes of the pass key's sentence"),
        (lambda: RecallDataModule(AssociativeRecall(), train_grid=[[64, 17]]), "at least 68 .4 tokens for each of 17"),
        (lambda: RecallDataModule(AssociativeRecall(64), val_grid=[[256, 40]]), "at least 66 for 32 pairs at length 256"),
        (lambda: RecallDataModule(AssociativeRecall(), val_grid=[[64]]), r"val_grid must hold \[length, pairs\]"),
        (lambda: RecallDataModule(AssociativeRecall(), train_grid=[]), "train_grid must hold"),
    ],
)  # fmt: skip
def test_impossible_settings_get_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_stream_pads_rows_of_other_settings() -> None:
    stream = TaskStream(0, [Setting(Reverse(), 2), Setting(Reverse(), 5)], group_size=1)
    rows = stream.read(np.arange(16))
    short = (rows["targets"][:, -1] == IGNORE_INDEX).nonzero()[0]
    assert 0 < len(short) < 16
    assert (rows["tokens"][short, 6:] == EOS).all()
