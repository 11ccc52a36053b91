"""The copy task: the official rows, fresh strings, one length per batch, and evaluation sets that never change."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.tasks.copying import Copy, CopyDataModule, RepetitiveCopy
from datamodules.tasks.module import Setting, TaskDataModule, TaskStream
from datamodules.tasks.strings import EOS, FIRST_LETTER, copy_rows, evaluation_sha256


def test_rows_are_the_official_ones() -> None:
    rows = copy_rows(np.array([[3, 28, 4]]))
    assert rows["tokens"].tolist() == [[0, 3, 28, 4, 1, 3, 28, 4]]
    assert rows["targets"].tolist() == [[-100, -100, -100, -100, 3, 28, 4, 2]]


def test_batches_are_int64_of_the_batch_size() -> None:
    data = CopyDataModule(batch_size=5, length=7, vocab_size=10)
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == batch["targets"].shape == (5, 16)
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert batch["tokens"][:, 1:8].min() >= 3
    assert batch["tokens"].max() < 10
    assert data.max_length == 16


def test_strings_are_fresh_and_depend_on_the_seed() -> None:
    first, second = (CopyDataModule(batch_size=512, batches_per_epoch=4, seed=seed) for seed in (0, 1))
    strings = torch.cat([batch["tokens"] for batch in first.train_dataloader()])
    assert len(strings.unique(dim=0)) == 2048
    assert not torch.equal(next(iter(second.train_dataloader()))["tokens"], strings[:512])


def test_training_never_shows_an_evaluation_string() -> None:
    data = CopyDataModule(batch_size=512, length=4, vocab_size=29, val_samples=64, batches_per_epoch=2)
    trained = {tuple(row.tolist()) for batch in data.train_dataloader() for row in batch["tokens"]}
    evaluated = [tuple(row.tolist()) for batch in data.val_dataloader()[0] for row in batch["tokens"]]
    # 26**4 = 457,000 strings: a stream that shared the evaluation's key would show all 64 of them.
    assert sum(row in trained for row in evaluated) < 3


def test_a_range_of_lengths_gives_one_length_per_batch_and_no_padding() -> None:
    data = CopyDataModule(batch_size=8, length=[3, 9], batches_per_epoch=200)
    lengths, padded, total = set(), 0, 0
    for batch in data.train_dataloader():
        answer = batch["targets"] != -100
        lengths.add(batch["tokens"].shape[1] // 2 - 1)
        # The answer, EOS included, is half of a row without padding.
        padded += int((batch["tokens"].shape[1] // 2 - answer.sum(1)).sum())
        total += batch["tokens"].numel()
        assert (batch["targets"][:, -1] == EOS).all()
    assert lengths == set(range(3, 10))
    assert padded / total < 0.1


def test_a_batch_across_two_lengths_is_padded_and_its_samples_unchanged() -> None:
    stream = TaskStream(0, [Setting(Copy(26), length) for length in range(2, 31)], group_size=4)
    rows = stream.read(np.arange(2, 6))
    alone = [stream.read(np.array([number])) for number in range(2, 6)]
    for name, filler in (("tokens", EOS), ("targets", -100)):
        for row, single in zip(rows[name], alone, strict=True):
            width = single[name].shape[1]
            assert np.array_equal(row[:width], single[name][0])
            assert (row[width:] == filler).all()


# A change of these would make results incomparable with those of other users.
@pytest.mark.parametrize(
    ("split", "length", "sha256"),
    [
        ("val", 16, "68c6b4435aa05b1184c34eeeed0f0e2506f24c5df98c3df19c5a0afa6f3cdac9"),
        ("test", 16, "31d8c9f144aa01e42d45acb33159a0e0b7064afb6d297c95004253b27b158586"),
    ],
)
def test_evaluation_sets_are_pinned(split: str, length: int, sha256: str) -> None:
    assert evaluation_sha256(split, length, 26, 256) == sha256


def test_evaluation_sets_are_one_per_length_whatever_the_training_seed() -> None:
    one = CopyDataModule(val_lengths=[4, 6], val_samples=10, seed=1, batch_size=4)
    other = CopyDataModule(val_lengths=[4, 6], val_samples=10, seed=2, batch_size=3)
    assert one.val_names == ["length_4", "length_6"]
    for ours, theirs in zip(one.val_dataloader(), other.val_dataloader(), strict=True):
        ours, theirs = (torch.cat([batch["tokens"] for batch in loader]) for loader in (ours, theirs))
        assert len(ours) == 10
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": [9, 3]}, r"length must be a number or \[shortest, longest\], got \[9, 3\]"),
        ({"length": 0}, "got 0"),
        ({"vocab_size": 3}, "at least 4, got 3"),
        ({"batch_size": 0}, "batch_size must be at least 1: got 0"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CopyDataModule(**arguments)


def test_a_checkpoint_of_another_stream_is_refused() -> None:
    state = CopyDataModule(length=[3, 9], batch_size=8).state_dict()
    with pytest.raises(ValueError, match="lengths was \\[3, 9\\] and is \\[3, 10\\]"):
        CopyDataModule(length=[3, 10], batch_size=8).load_state_dict(state)
    # The batch is what shares a length, so it is part of the stream's identity; with one length it is not.
    with pytest.raises(ValueError, match="group_size was 8 and is 4"):
        CopyDataModule(length=[3, 9], batch_size=4).load_state_dict(state)
    CopyDataModule(length=5, batch_size=4).load_state_dict(
        CopyDataModule(length=5, batch_size=8).state_dict()
    )


def test_repetitive_strings_have_few_letters() -> None:
    task = RepetitiveCopy(alphabet_size=26, fewest_letters=4)
    strings = task.rows(np.uint64(5), np.arange(500), 300)["tokens"][:, 1:301]
    # 300 draws hold all of their letters but for one string in a thousand.
    numbers = Counter(len(set(row)) for row in strings.tolist())
    assert set(numbers) == set(range(4, 27))
    assert max(numbers.values()) < 3 * 500 / 23
    # Which letters a string has is drawn for it alone.
    assert np.bincount(strings[:, 0] - FIRST_LETTER, minlength=26).min() > 0
    assert strings.min() == FIRST_LETTER
    assert strings.max() == task.vocab_size - 1


def test_endings_are_repeated_elsewhere() -> None:
    task = RepetitiveCopy(fewest_letters=26, longest_ending=6)
    repeated = Counter[int]()
    for row in task.rows(np.uint64(5), np.arange(700), 40)["tokens"][:, 1:41].tolist():
        text = bytes(row)
        repeated[next(n for n in range(8) if text[-n - 1 :] not in text[: len(text) - n - 1])] += 1
    # 0 to 6 letters alike; more than the six by chance, and a letter or two where none were written.
    assert all(repeated[n] > 700 / 7 / 2 for n in range(2, 7))
    assert repeated[7] < 700 / 7 / 4
    for length in range(1, 4):
        assert task.rows(np.uint64(5), np.arange(50), length)["tokens"].shape == (50, 2 * length + 2)


def test_repetitive_strings_are_for_training_only() -> None:
    data = TaskDataModule(RepetitiveCopy(), batch_size=8, length=[10, 12], val_lengths=[20], val_samples=8)
    plain = TaskDataModule(Copy(), batch_size=8, length=[10, 12], val_lengths=[20], val_samples=8)
    ids = np.arange(8)
    for split in ("val", "test"):
        ((ours, _),), ((theirs, _),) = data.eval_samples(split), plain.eval_samples(split)
        assert np.array_equal(ours.read(ids)["tokens"], theirs.read(ids)["tokens"])
    ours, theirs = data.train_samples().read(ids), plain.train_samples().read(ids)
    assert not np.array_equal(ours["tokens"], theirs["tokens"])
    # A run on one stream does not go on with the other.
    assert data.identity() != plain.identity()
    assert data.identity()["fewest_letters"] == 4
