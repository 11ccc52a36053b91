"""The synthetic tasks: their rows are what they say, samples are functions of their index, mistakes get one line."""

import doctest
import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.order import random_subset, random_uniform
from datamodules.stream import IGNORE_INDEX
from datamodules.tasks import InductionHeads, SelectiveCopying, copying, passkey, recall, string_tasks
from datamodules.tasks.copying import Copy, RepetitiveCopy
from datamodules.tasks.module import Setting, TaskDataModule, TaskStream
from datamodules.tasks.passkey import Passkey
from datamodules.tasks.recall import ZOOLOGY_TRAIN, ZOOLOGY_VAL, AssociativeRecall, RecallDataModule
from datamodules.tasks.string_tasks import DuplicatedNgrams, PrefixLookup, Reverse, SuffixLookup
from datamodules.tasks.strings import BOS, EOS, FIRST_LETTER, SEP, counters
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


def test_reversed_strings() -> None:
    rows = rows_of(Reverse(), 9)
    strings = rows["tokens"][:, 1:10]
    assert np.array_equal(rows["targets"][:, 10:-1], strings[:, ::-1])
    assert (rows["targets"][:, -1] == EOS).all()


@pytest.mark.parametrize("length", [6, 30])
def test_duplicated_ngrams_stand_twice(length: int) -> None:
    rows = rows_of(DuplicatedNgrams(n_gram=3, alphabet_size=1000), length)
    for string in rows["tokens"][:, 1 : length + 1].tolist():
        counts = Counter(tuple(string[i : i + 3]) for i in range(length - 2))
        assert max(counts.values()) == 2
    assert np.array_equal(rows["targets"][:, length + 1 : -1], rows["tokens"][:, 1 : length + 1])


@pytest.mark.parametrize(("n_gram", "alphabet_size"), [(1, 30), (2, 5), (3, 26)])
@pytest.mark.parametrize("kind", [PrefixLookup, SuffixLookup])
def test_lookups_ask_for_an_ngram_that_occurs_once(kind: Any, n_gram: int, alphabet_size: int) -> None:
    length, answer_length = 24, 4
    rows = rows_of(kind(n_gram, answer_length, alphabet_size), length)
    starts = set()
    for tokens, targets in zip(rows["tokens"].tolist(), rows["targets"].tolist(), strict=True):
        first, second = tokens[1:].index(SEP) + 1, len(tokens) - answer_length
        if kind is PrefixLookup:
            ngram, string = tokens[1:first], tokens[first + 1 : second - 1]
            assert tokens[second - 1] == SEP
        else:
            string, ngram = tokens[1:first], tokens[first + 1 : second]
        assert (len(string), len(ngram)) == (length, n_gram)
        places = [i for i in range(length - n_gram + 1) if string[i : i + n_gram] == ngram]
        assert len(places) == 1
        starts.add(places[0])
        answer = string[places[0] + n_gram :][:answer_length]
        assert [target for target in targets if target != IGNORE_INDEX] == [*answer, EOS]
        assert tokens[second:] == answer
        assert targets.index(answer[0]) == second - 1
    assert len(starts) > 5


@pytest.mark.parametrize("random_filler", [False, True])
def test_each_key_is_asked_once_and_answered_by_its_value(random_filler: bool) -> None:
    pairs, length, vocab_size = 6, 40, 64
    rows = rows_of(AssociativeRecall(vocab_size, pairs, random_filler), length)
    for tokens, targets in zip(rows["tokens"].tolist(), rows["targets"].tolist(), strict=True):
        values = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(values) == len(set(values.values())) == pairs
        assert all(1 <= key < vocab_size // 2 <= value < vocab_size for key, value in values.items())
        asked = {tokens[i]: target for i, target in enumerate(targets) if target != IGNORE_INDEX}
        assert asked == values
        blanks = [token for i, token in enumerate(tokens) if i >= 2 * pairs and targets[i] == IGNORE_INDEX]
        assert any(blanks) == random_filler


def test_queries_crowd_near_the_pairs() -> None:
    task = AssociativeRecall(vocab_size=64, pairs=1, random_filler=False)
    ids = np.arange(20_000)
    slots = task.query_slots(np.uint64(3), ids, 10, 1)[:, 0]
    weights = np.arange(1, 11) ** (0.01 - 1)
    shares = np.bincount(slots, minlength=10) / len(ids)
    assert shares == pytest.approx(weights / weights.sum(), abs=0.01)


def test_zoologys_grid_is_the_default() -> None:
    data = RecallDataModule(AssociativeRecall(), batch_size=2, val_samples=2, batches_per_epoch=40)
    assert data.val_names[-1] == "length_1024_pairs_256"
    assert len(data.val_names) == len(ZOOLOGY_VAL)
    seen = set()
    for batch in data.train_dataloader():
        pairs = (batch["targets"] != IGNORE_INDEX).sum(1)
        assert pairs.min() == pairs.max()
        seen.add((batch["tokens"].shape[1], int(pairs[0])))
    assert seen == {(length, pairs) for length, pairs in ZOOLOGY_TRAIN}
    assert data.training_lengths == (64, 256)
    last = next(iter(data.val_dataloader()[-1]))
    assert last["tokens"].shape == (2, 1024)
    assert ((last["targets"] != IGNORE_INDEX).sum(1) == 256).all()


def test_a_run_on_another_grid_is_another_run() -> None:
    grid = [[64, 4], [64, 8]]
    state = RecallDataModule(AssociativeRecall(), train_grid=grid).state_dict()
    with pytest.raises(
        ValueError, match=r"grid was \[\[64, 4\], \[64, 8\]\] and is \[\[64, 4\], \[64, 16\]\]"
    ):
        RecallDataModule(AssociativeRecall(), train_grid=[[64, 4], [64, 16]]).load_state_dict(state)


def test_letters_are_said_in_their_order_without_the_blanks() -> None:
    rows = rows_of(SelectiveCopying(letters=5, alphabet_size=4), 12)
    blank = FIRST_LETTER + 4
    for tokens, targets in zip(rows["tokens"].tolist(), rows["targets"].tolist(), strict=True):
        letters = [token for token in tokens[1:13] if token != blank]
        assert tokens[13:] == [SEP, *letters]
        assert targets[13:] == [*letters, EOS]


def test_the_letter_after_the_trigger_is_wanted() -> None:
    rows = rows_of(InductionHeads(alphabet_size=4), 12)
    for tokens, targets in zip(rows["tokens"].tolist(), rows["targets"].tolist(), strict=True):
        assert (tokens[0], tokens[-1], tokens.count(SEP)) == (BOS, SEP, 2)
        assert targets[-1] == tokens[tokens.index(SEP) + 1]
        assert targets[:-1] == [IGNORE_INDEX] * 13


def test_the_pass_key_stands_in_the_text_once() -> None:
    shortest = len("The pass key is 12345. Remember it. What is the pass key? The pass key is ")
    for length in (shortest, 500):
        rows = rows_of(Passkey(), length)
        places = set()
        for tokens, targets in zip(rows["tokens"].tolist(), rows["targets"].tolist(), strict=True):
            text, number = bytes(tokens[1 : length + 1]).decode(), bytes(tokens[length + 1 :]).decode()
            assert text.count(f"The pass key is {number}. Remember it. ") == 1
            assert text.endswith("What is the pass key? The pass key is ")
            assert targets[length:] == [*number.encode(), EOS]
            places.add(text.index("The pass key"))
        assert len(places) > (5 if length == 500 else 0)


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
