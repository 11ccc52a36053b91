"""Gains and biases: the published values, and settings that do not fit."""

import math

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import HardAlibi, LearnedGain, LearnedLogLengthGain, LogLengthGain, Nape, PairBias
from causalrn.models.pair_terms import alibi_slopes


def test_gain_grows_with_the_position_and_stays_positive() -> None:
    positions = torch.tensor([0, 98, 9998])
    expected = torch.tensor([LogLengthGain.LEAST, 1.0, 1 + 0.4 * math.log(100)])
    assert_close(LogLengthGain()(positions)[:, 0], expected)
    assert_close(LearnedLogLengthGain(3)(positions), expected[:, None].expand(3, 3))


def test_published_slopes_and_windows() -> None:
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert Nape(4).slopes == [0.0, 0.0, 2.0**-4, 2.0**-8]
    assert HardAlibi(4, 3).windows == [1, 2, 3, None]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairBias(slopes=[-1.0]), r"slopes must be at least 0: got \[-1.0\]"),
        (lambda: PairBias(windows=[0]), "windows must be at least 1"),
        (lambda: PairBias(slopes=[0.5, float("nan")]), r"slopes must be at least 0: got \[0.5, nan\]"),
        (lambda: PairBias(slopes=[]), "slopes are one per head: got none"),
        (lambda: PairBias(windows=[]), "windows are one per head: got none"),
        (lambda: LearnedGain(1, 0.0), "start must be above 0: got 0.0"),
        (lambda: LogLengthGain(reference=0.0), "reference must be above 0: got 0.0"),
        (lambda: PairBias([0.1], [1, 2]), "got 1 and 2"),
        (lambda: HardAlibi(2, 3), r"n_windowed must be in \[0, 2\]: got 3"),
    ],
)
def test_wrong_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
