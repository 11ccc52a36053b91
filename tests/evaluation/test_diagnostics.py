"""Diagnostics against the whole tensor of pairs, on constructed retrievals, as a callback and as a command."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from causalrn.evaluation import diagnostics
from causalrn.evaluation.diagnostics import Pairs, dispersion, probe, probe_pairs, trained_positions
from causalrn.evaluation.pairs import pair_norms
from causalrn.models import LanguageModel, LinearRelation, Mixer, QuadraticRelation
from causalrn.ops.pairs import PairTerms
from causalrn.ops.reference import ACTIVATIONS, normalise, pair_weights

MIXERS: dict[str, Callable[[], QuadraticRelation | LinearRelation]] = {
    "exact": lambda: QuadraticRelation(8, 12, n_heads=2),
    "rms": lambda: QuadraticRelation(8, 12, norm="rms"),
    "approx": lambda: QuadraticRelation(8, 12, pre_norm="approx"),
    "none": lambda: QuadraticRelation(8, 12, pre_norm="none", activation="relu"),
    "bidirectional": lambda: QuadraticRelation(8, 12, causal=False),
    "linear": lambda: LinearRelation(8, 12, n_heads=3),
}
LENGTH = 11


def make_network(mixer: Mixer) -> LanguageModel:
    network = LanguageModel(mixer, vocab_size=29, n_layers=3, max_length=20).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("tile_elements", [1, 100, 10**6])
def test_probes_see_the_whole_tensor_of_pairs(
    name: str, tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostics, "TILE_ELEMENTS", tile_elements)
    network = make_network(MIXERS[name]())
    tokens = torch.randint(29, (2, LENGTH))
    positions = torch.tensor([0, 3, 10])
    inputs: list[torch.Tensor] = []
    handles = [
        block.mixer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for block in network.layers
    ]
    layers = probe(network, tokens, positions)
    for handle in handles:
        handle.remove()
    assert len(layers) == len(inputs) == 3
    for block, x, pairs in zip(network.layers, inputs, layers, strict=True):
        mixer = block.mixer
        assert isinstance(mixer, QuadraticRelation | LinearRelation)
        with torch.no_grad():
            q, k = mixer.project(x)
        exact = isinstance(mixer, QuadraticRelation) and mixer.pre_norm == "exact"
        activation = "exp"
        if isinstance(mixer, LinearRelation):
            q, k = (normalise(t, mixer.norm, mixer.eps) for t in (q, k))
        else:
            activation = mixer.pair_rule.activation
        sums = q[:, positions, None] + k[:, None]
        z = normalise(sums, mixer.norm, mixer.eps) if exact else sums
        reached = torch.ones(3, LENGTH, dtype=torch.bool)
        if mixer.causal:
            reached = torch.arange(LENGTH) <= positions[:, None]
        assert torch.equal(pairs.reached[0], reached)
        mask = reached[None, None].expand_as(pairs.largest)
        assert_close(pairs.largest[mask], z.amax(-1).permute(0, 3, 1, 2)[mask])
        norms = ACTIVATIONS[activation](z).norm(dim=-1).permute(0, 3, 1, 2)
        assert_close(pairs.log_norm.exp()[mask], norms[mask], atol=1e-4, rtol=1e-4)
        assert (pairs.log_norm[~mask] == -math.inf).all()
        assert (pairs.inverse_std is not None) == exact
        if pairs.inverse_std is not None:
            centred = sums - sums.mean(-1, keepdim=True) if mixer.norm == "layer" else sums
            inverse = 1 / (centred.square().mean(-1).sqrt() + mixer.eps)
            assert_close(pairs.inverse_std[mask], inverse.permute(0, 3, 1, 2)[mask], atol=1e-4, rtol=1e-4)
        if pairs.bound is not None:
            assert (pairs.largest.amax(-1) <= pairs.bound * 1.001).all()
        assert (pairs.bound is None) == (name == "none")


def test_norms_are_those_of_the_heat_map() -> None:
    network = make_network(QuadraticRelation(8, 12, n_heads=2))
    tokens = torch.randint(29, (LENGTH,))
    (pairs,) = probe(network, tokens[None], torch.arange(LENGTH))[1:2]
    expected = pair_norms(network, tokens, 1)
    mask = ~expected.isnan()
    assert_close(pairs.log_norm[0].exp()[mask], expected[mask], atol=1e-4, rtol=1e-4)


def relate(q: torch.Tensor, k: torch.Tensor, positions: list[int]) -> Pairs:
    mixer = QuadraticRelation(8, q.shape[-1], eps=0.0)
    return probe_pairs(mixer, q[None, :, None], k[None, :, None], torch.tensor(positions))


class GainedRelation(QuadraticRelation):
    """A relation with what the operator takes besides: a gain per position and head, a window and a decay per head."""

    def pair_terms(self, positions: torch.Tensor) -> PairTerms:
        gain = torch.stack([1 + 0.1 * positions, 0.5 + 0 * positions], -1)
        return PairTerms(gain, torch.tensor([4, 2**30]), torch.tensor([0.0, 0.3]))


def test_gains_windows_and_decays_are_those_of_the_operator() -> None:
    mixer = GainedRelation(8, 12, n_heads=2)
    q, k = torch.randn(2, 1, LENGTH, 2, 6).unbind(0)
    positions = torch.arange(LENGTH)
    pairs = probe_pairs(mixer, q, k, positions)
    gain, window, slope = mixer.pair_terms(positions)
    assert gain is not None
    z = normalise(q[:, :, None] + k[:, None], "layer", mixer.eps) * gain[None, :, None, :, None]
    weights = pair_weights(LENGTH, LENGTH, causal=True, like=q, window=window, slope=slope)
    norms = z.exp().norm(dim=-1).permute(0, 3, 1, 2) * weights
    assert_close(pairs.log_norm.exp(), norms, atol=1e-4, rtol=1e-4)
    assert pairs.counts().tolist()[0] == [min(i + 1, 4) for i in range(LENGTH)]
    assert pairs.bound is not None
    assert_close(pairs.bound, math.sqrt(5) * gain.mT)


def test_retrieval_and_its_absence_are_told_apart() -> None:
    length, channels = 64, 192
    k = torch.randn(length, channels)
    # Every position asks for position 2: what is left of the sum is one channel, which the norm amplifies.
    q = -k[2].repeat(length, 1)
    q[:, 5] += 1e-3
    positions = list(range(3, length))
    sharp = relate(q, k, positions).summary()
    assert sharp["inverse_std_max"] > 1000
    assert sharp["largest_exponent_max"] == pytest.approx(math.sqrt(channels - 1), rel=1e-4)
    assert sharp["saturation"] == pytest.approx(1, rel=1e-4)
    assert sharp["saturated"] == 1
    assert sharp["effective_positions"] == pytest.approx(1, abs=0.1)
    assert sharp["top_share"] > 0.8
    assert abs(sharp["dispersion"]) < 0.15
    # All positions alike: each takes as much from any other.
    flat = relate(
        torch.randn(1, channels).repeat(length, 1), torch.zeros(length, channels), positions
    ).summary()
    assert flat["effective_share"] == pytest.approx(1, abs=1e-4)
    assert flat["top_share"] == pytest.approx(sum(1 / (i + 1) for i in positions) / len(positions), rel=1e-4)
    assert flat["dispersion"] == pytest.approx(1, abs=1e-4)
    assert flat["saturated"] == 0


def test_wide_layers_do_not_overflow() -> None:
    channels = 8192
    q = torch.zeros(4, channels)
    q[:, 0] = 1.0
    summary = relate(q, torch.zeros(4, channels), [0, 3]).summary()
    assert summary["largest_exponent_max"] == pytest.approx(math.sqrt(channels - 1), rel=1e-3)
    assert all(math.isfinite(value) for value in summary.values())


def test_dispersion_needs_lengths_that_differ() -> None:
    assert dispersion(torch.tensor([2.0]), torch.tensor([8.0])) is None
    assert dispersion(torch.tensor([2.0, 2.1]), torch.tensor([8.0, 9.0])) is None
    counts = torch.tensor([8.0, 16.0, 32.0])
    assert dispersion(counts**0.5, counts) == pytest.approx(0.5, rel=1e-4)


def test_positions_with_targets_are_thinned_out_evenly() -> None:
    targets = torch.full((2, 20), -100)
    targets[0, 10:] = 3
    assert trained_positions(targets, 99).tolist() == list(range(10, 20))
    assert trained_positions(targets, 4).tolist() == [10, 13, 16, 19]
    assert trained_positions(torch.full((2, 20), -100), 4).tolist() == []


def test_hooks_are_taken_off_after_a_failure() -> None:
    network = make_network(QuadraticRelation(8, 12))
    with pytest.raises(ValueError, match="max_length=20"):
        probe(network, torch.zeros(1, 21, dtype=torch.int64), torch.tensor([0]))
    assert not any(module._forward_pre_hooks for module in network.modules())
