"""Recall from the context: what is asked, and what is answered."""

import numpy as np
import pytest

from datamodules.stream import IGNORE_INDEX
from datamodules.tasks import InductionHeads, SelectiveCopying
from datamodules.tasks.recall import ZOOLOGY_TRAIN, ZOOLOGY_VAL, AssociativeRecall, RecallDataModule
from datamodules.tasks.strings import BOS, EOS, FIRST_LETTER, SEP
from tests.datamodules.tasks.rows import rows_of


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
