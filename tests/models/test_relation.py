"""The relation of positions: the logarithm of the mean, and settings that do not fit."""

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import Alibi, LearnedGain, LogLengthGain, LogMeanExpRelation, PositionalRelation
from causalrn.ops.reference import normalise


def test_logarithm_of_one_pair_does_not_depend_on_the_gain() -> None:
    x = torch.randn(2, 1, 8)
    mixers = [LogMeanExpRelation(8, 12, gain=LearnedGain(1, start)) for start in (1.0, 3.0)]
    mixers[1].load_state_dict({**mixers[0].state_dict(), "gain.factor": torch.tensor([3.0])})
    assert_close(mixers[0](x), mixers[1](x))


def test_log_mean_exp_of_all_pairs() -> None:
    gain = LogLengthGain(reference=5.0)
    mixer = LogMeanExpRelation(8, 12, 2, gain=gain)
    x = torch.randn(2, 7, 8)
    q, k = mixer.project(x)
    pairs = normalise(q[:, :, None] + k[:, None], "layer", mixer.eps)
    order = gain(torch.arange(7))[:, None, :, None]
    later = torch.ones(7, 7).triu(1).bool()[:, :, None, None]
    sums = (order * pairs).masked_fill(later, -torch.inf).logsumexp(2)
    expected = (sums - torch.arange(1, 8).log()[:, None, None]) / order[:, 0]
    assert_close(mixer.relate(q, k), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PositionalRelation(8, 12, 2, gain=LearnedGain(3)), "gain.*got 3 for n_heads=2"),
        (lambda: PositionalRelation(8, 12, 2, bias=Alibi(4)), "slopes.*got 4 for n_heads=2"),
        (lambda: PositionalRelation(8, 12, 0), "n_heads"),
    ],
)
def test_wrong_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
