"""The heat map of pairs shows what the operators add up, and names what it cannot draw."""

import math

import pytest
import torch
from torch.testing import assert_close

from causalrn.evaluation.pairs import pair_norms
from causalrn.models import (
    LanguageModel,
    LinearRelation,
    LogLengthGain,
    Mixer,
    PairBias,
    PositionalRelation,
    QuadraticRelation,
    ShortConvolution,
    SoftmaxAttention,
)
from causalrn.ops import normalise

MIXERS = {
    "quadratic": lambda: QuadraticRelation(8, 12, n_heads=2),
    "relu": lambda: QuadraticRelation(8, 12, pre_norm="approx", activation="relu"),
    "linear": lambda: LinearRelation(8, 12, n_heads=3),
}


def make_network(mixer: Mixer, convolution: ShortConvolution | None = None) -> LanguageModel:
    return LanguageModel(
        mixer, vocab_size=29, n_layers=3, max_length=20, short_convolution=convolution
    ).eval()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_norms_are_those_of_the_definition(mixer: str, layer: int) -> None:
    network = make_network(MIXERS[mixer](), ShortConvolution(8, 3) if layer else None)
    relation = network.layers[layer].mixer
    assert isinstance(relation, QuadraticRelation | LinearRelation)
    tokens = torch.randint(29, (10,))
    seen = []
    relation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(tokens[None])
        q, k = (t[0] for t in relation.project(seen[0]))
        norms = pair_norms(network, tokens, layer)
    for i, j in ((0, 0), (7, 3), (9, 9)):
        if isinstance(relation, LinearRelation):
            added = (normalise(q[i], "layer", relation.eps) + normalise(k[j], "layer", relation.eps)).exp()
        elif relation.pre_norm == "approx":
            # `project` has normalised both already.
            added = (q[i] + k[j]).relu()
        else:
            added = normalise(q[i] + k[j], "layer", relation.eps).exp()
        assert_close(norms[:, i, j], added.norm(dim=-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(norms[0].isnan(), torch.ones(10, 10).triu(1).bool())


def test_a_gain_and_slopes_count() -> None:
    slopes = PairBias(slopes=[0.1, 0.0])
    relation = PositionalRelation(8, 12, n_heads=2, gain=LogLengthGain(reference=4.0), bias=slopes)
    network = make_network(relation)
    relation = network.layers[0].mixer
    assert isinstance(relation, PositionalRelation)
    tokens = torch.randint(29, (9,))
    with torch.no_grad():
        q, k = (t[0] for t in relation.project(network.embed(tokens[None], 0)))
        gain = relation.pair_terms(torch.tensor(8)).gain
        assert gain is not None
        z = normalise(q[8] + k[2], "layer", relation.eps) * gain[:, None]
        weight = torch.tensor([math.exp(-0.1 * 6), 1.0])
        assert_close(
            pair_norms(network, tokens, 0)[:, 8, 2], z.exp().norm(dim=-1) * weight, atol=1e-5, rtol=1e-5
        )


def test_attention_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="SoftmaxAttention"):
        pair_norms(make_network(SoftmaxAttention(8)), torch.zeros(3, dtype=torch.int64), 0)
