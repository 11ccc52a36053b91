"""The official stable form: each head divided by its greatest channel and by the number of its pairs."""

import torch
from torch.testing import assert_close

from causalrn.models import QuadraticRelation, QuadraticRelationScaledHeads


def test_one_head_without_eps_is_the_plain_relation() -> None:
    scaled, plain = (cls(8, 12, eps=0.0) for cls in (QuadraticRelationScaledHeads, QuadraticRelation))
    plain.load_state_dict(scaled.state_dict())
    x = torch.randn(2, 7, 8)
    assert_close(scaled(x), plain(x), atol=1e-5, rtol=1e-5)


def test_the_greatest_channel_of_a_head_is_one_over_its_pairs() -> None:
    x = torch.randn(2, 7, 8)
    for causal, pairs in ((True, torch.arange(1.0, 8.0)), (False, torch.full((7,), 7.0))):
        mixer = QuadraticRelationScaledHeads(8, 12, n_heads=2, causal=causal)
        greatest = mixer.relate(*mixer.project(x)).amax(-1)
        assert_close(greatest, (1 / pairs)[:, None].expand(2, 7, 2))
