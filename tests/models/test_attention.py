"""Attention against its formula: ALiBi, rotary angles, linear attention in parts."""

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import Alibi, HardAlibi, LinearAttention, Rotary, SoftmaxAttention
from causalrn.models.pair_terms import alibi_slopes


def test_attention_bias_is_alibi() -> None:
    mixer = SoftmaxAttention(8, 2, bias=Alibi(2))
    x = torch.randn(1, 6, 8)
    q, k, v = (t.transpose(1, 2) for t in mixer.project(x))
    i, j = torch.arange(6)[:, None], torch.arange(6)
    logits = q @ k.mT / 2 - torch.tensor(alibi_slopes(2))[:, None, None] * (i - j)
    attention = logits.masked_fill(j > i, -torch.inf).softmax(-1) @ v
    assert_close(mixer(x), mixer.out_proj(attention.transpose(1, 2).flatten(2)))


def test_linear_attention_in_parts_equals_the_whole() -> None:
    mixer = LinearAttention(8, n_heads=2)
    x = torch.randn(2, 3 * mixer.PART + 5, 8)
    whole, _ = mixer.mix(x, None)
    assert_close(mixer(x), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftmaxAttention(8, 2, bias=HardAlibi(3, 1)), "windows.*got 3 for n_heads=2"),
        (lambda: SoftmaxAttention(6, 2, rotary=Rotary()), "3 channels per head"),
    ],
)
def test_wrong_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
