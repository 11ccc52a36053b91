"""The metrics against values worked out by hand, and exact over uneven batches."""

import math

import pytest
import torch
from torch import Tensor

from causalrn.evaluation.metrics import (
    EOS,
    IGNORE_INDEX,
    BitsPerByte,
    CharacterAccuracy,
    CopyAccuracy,
    ExactMatch,
    FirstErrors,
    MeanLoss,
    PositionLoss,
)

# Three letters and EOS after two ignored positions.
TARGETS = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 5, 6, 7, EOS]])


def predict(*answer: int) -> Tensor:
    return torch.tensor([[9, 9, *answer]])


@pytest.mark.parametrize(
    ("answer", "copy", "exact", "characters"),
    [
        ((5, 6, 7, EOS), 1.0, 1.0, 1.0),
        ((5, 8, 7, EOS), 2 / 3, 0.0, 2 / 3),
        # No EOS at the end, and one that comes too early: the paper counts the string 0.
        ((5, 6, 7, 8), 0.0, 0.0, 1.0),
        ((5, EOS, 7, EOS), 0.0, 0.0, 2 / 3),
    ],
)
def test_one_string(answer: tuple[int, ...], copy: float, exact: float, characters: float) -> None:
    for metric, expected in (
        (CopyAccuracy(), copy),
        (ExactMatch(), exact),
        (CharacterAccuracy(), characters),
    ):
        metric.update(predict(*answer), TARGETS)
        assert metric.compute().item() == pytest.approx(expected)


def test_padding_after_the_answer_counts_nothing() -> None:
    padded = torch.cat([TARGETS, torch.full((1, 2), IGNORE_INDEX)], 1)
    predictions = torch.cat([predict(5, 6, 7, EOS), torch.tensor([[EOS, 4]])], 1)
    for metric in (CopyAccuracy(), ExactMatch(), CharacterAccuracy()):
        metric.update(predictions, padded)
        assert metric.compute().item() == 1.0


def test_uneven_batches_weigh_by_their_size() -> None:
    metric = ExactMatch()
    right, wrong = predict(5, 6, 7, EOS), predict(5, 6, 8, EOS)
    metric.update(right.repeat(3, 1), TARGETS.repeat(3, 1))
    metric.update(wrong, TARGETS)
    assert metric.compute().item() == 0.75


def test_losses_are_ratios_of_sums() -> None:
    loss, bits = MeanLoss(), BitsPerByte(torch.tensor([1, 1]))
    for nats, tokens in ((6.0, 3), (1.0, 1)):
        loss.update(torch.tensor(nats), tokens)
        bits.update(torch.tensor(nats), torch.tensor(2 * tokens))
    assert loss.compute().item() == pytest.approx(7 / 4)
    assert bits.compute().item() == pytest.approx(7 / math.log(2) / 8)


def test_counts_stay_exact_beyond_float32() -> None:
    metric = MeanLoss()
    metric.update(torch.tensor(0.0), 2**24)
    metric.update(torch.tensor(1.0), 1)
    assert metric.count.item() == 2**24 + 1


def test_rows_without_targets_count_nothing() -> None:
    rows = torch.cat([TARGETS, torch.full_like(TARGETS, IGNORE_INDEX)])
    predictions = predict(5, 8, 7, EOS).repeat(2, 1)
    for metric, expected in ((CopyAccuracy(), 2 / 3), (ExactMatch(), 0.0), (CharacterAccuracy(), 2 / 3)):
        metric.update(predictions, rows)
        assert metric.compute().item() == pytest.approx(expected)


def test_answers_without_eos_count_every_token() -> None:
    targets = torch.tensor([[IGNORE_INDEX, 7, IGNORE_INDEX, 9]])
    for metric, expected in ((CopyAccuracy(), 0.5), (ExactMatch(), 0.0), (CharacterAccuracy(), 0.5)):
        metric.update(torch.tensor([[3, 7, 3, 3]]), targets)
        assert metric.compute().item() == expected


def test_first_errors_are_counted_within_the_answer() -> None:
    metric = FirstErrors()
    for answer in ((5, 6, 7, EOS), (5, 6, 7, 8), (5, 8, 8, EOS)):
        metric.update(predict(*answer), TARGETS)
    metric.update(predict(9, 9, 9, 9), torch.full_like(TARGETS, IGNORE_INDEX))
    right, places = metric.compute()
    assert right.item() == pytest.approx((4 + 3 + 1) / 3)
    assert places.tolist() == [1, 3]


def test_losses_by_position() -> None:
    metric = PositionLoss(6)
    nats = torch.arange(6.0) * (TARGETS != IGNORE_INDEX)
    metric.update(nats, TARGETS)
    metric.update(
        torch.cat([nats, torch.zeros(1, 6)]), torch.cat([TARGETS, torch.full((1, 6), IGNORE_INDEX)])
    )
    total, count = metric.compute()
    assert total.tolist() == [0, 0, 4, 6, 8, 10]
    assert count.tolist() == [0, 0, 2, 2, 2, 2]
