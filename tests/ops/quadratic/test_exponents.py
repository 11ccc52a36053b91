"""Exponents beyond the range of floats: the quadratic relation and its step against the logarithm in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrn.models import (
    LearnedGain,
    LogLengthGain,
    LogMeanExpRelation,
    PairBias,
    PositionalRelation,
    QuadraticRelation,
)
from causalrn.ops import relation_quadratic, relation_quadratic_shifted
from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.ops.quadratic.step import relation_quadratic_step
from causalrn.ops.reference import relation_quadratic_log_reference

# The recipe's gain of configs/copy/extrapolate.yaml at position 1e6: with D 3072 exponents reach 260.
GAIN = LogLengthGain(0.4, 100.0)(torch.tensor(1_000_000)).item()
CHANNELS = 3072
# exp makes a relative error of the rounding of an exponent of 260, 1.6e-5, and gradients add up many of them.
TOLERANCE = 3e-4
SETTINGS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"causal": False},
    "rms": {"norm": "rms"},
    "window": {"window": [3, 1000]},
    # So steep that a pair far away has a weight of 0 in float32, which its exponent makes up for.
    "slope": {"slope": [20.0, 0.5]},
    "all": {"window": [9, 1000], "slope": [20.0, 0.01], "causal": False, "norm": "rms"},
}


def make_inputs(
    n_queries: int, n_keys: int, channels: int, heads: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, gain and the gradient of the result: ordinary pairs, some that are nearly one-hot, and gains in and beyond range."""
    q, grad = torch.randn(2, 1, n_queries, heads, channels)
    k = torch.randn(1, n_keys, heads, channels)
    gain = torch.full((n_queries, heads), GAIN)
    gain[::3] = 1.0
    gain[1, 0] *= -1
    before = n_keys - n_queries
    for i, j, sign in ((4, 1, 1), (5, 5, -1), (6, 2, 1), (n_queries - 1, 0, 1)):
        q[:, i] = -k[:, min(j, i + before)] + 1e-3 * q[:, i]
        q[:, i, :, 7] += 10 * sign
    return q, k, gain, grad


def tensors(settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    out = dict(settings)
    if "window" in out:
        out["window"] = torch.tensor(out["window"], dtype=torch.int32)
    if "slope" in out:
        out["slope"] = torch.tensor(out["slope"], dtype=dtype)
    return out


def terms_and_rule(
    settings: dict[str, Any], dtype: torch.dtype, gain: Tensor | None = None
) -> tuple[PairTerms, PairRule]:
    options = tensors(settings, dtype)
    terms = PairTerms(gain, options.pop("window", None), options.pop("slope", None))
    return terms, PairRule(1e-5, **options)


def log_mean(q: Tensor, k: Tensor, terms: PairTerms, rule: PairRule) -> Tensor:
    out, shift = relation_quadratic_shifted(q, k, terms, rule)
    assert shift is not None
    return out.to(shift.dtype).log() + shift


def differentiate(
    function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype, **settings: Any
) -> dict[str, Tensor]:
    q, k, gain = (x.to(dtype).clone().requires_grad_() for x in inputs[:3])
    out = function(q, k, *terms_and_rule(settings, dtype, gain))
    gradients = torch.autograd.grad(out, (q, k, gain), inputs[3].to(out))
    return dict(zip(("out", "dq", "dk", "dgain"), (out.detach(), *gradients), strict=True))


def row_error(actual: Tensor, exact: Tensor) -> float:
    """Largest error of any row, in units of that row's largest element: rows differ by many orders of magnitude."""
    difference, largest = (x.double().abs().amax(-1) for x in (actual - exact, exact))
    return (difference / largest.clamp(min=1e-30)).max().item()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("path")
def test_far_beyond_the_range(name: str) -> None:
    inputs = make_inputs(11, 17, CHANNELS)
    exact = differentiate(relation_quadratic_log_reference, inputs, torch.float64, **SETTINGS[name])
    plain = differentiate(relation_quadratic_log_reference, inputs, torch.float32, **SETTINGS[name])
    ours = differentiate(log_mean, inputs, torch.float32, **SETTINGS[name])
    assert exact["out"].amax() > 88
    for key, wanted in exact.items():
        assert ours[key].isfinite().all(), key
        errors = [row_error(x[key], wanted) for x in (ours, plain)]
        assert errors[0] <= 2 * errors[1] + TOLERANCE, f"{key}: {errors[0]:.1e}, plain {errors[1]:.1e}"


@pytest.mark.usefixtures("path")
def test_rows_in_range_are_those_of_the_plain_operator() -> None:
    q, k, gain, _ = make_inputs(11, 17, 300)
    plain = relation_quadratic(q, k, PairTerms(gain[:1].expand(11, 2)), PairRule(1e-5))
    out, shift = relation_quadratic_shifted(q, k, PairTerms(gain[:1].expand(11, 2)), PairRule(1e-5))
    assert shift is not None
    assert not shift.any()
    assert torch.equal(out, plain)
    # Beside rows that are shifted they are the same as well.
    gain = gain * torch.where(gain == 1, 1, 10)
    out, shift = relation_quadratic_shifted(q, k, PairTerms(gain), PairRule(1e-5))
    assert shift is not None
    assert shift[:, 1::3].all()
    assert not shift[:, ::3].any()
    torch.testing.assert_close(out[:, ::3], plain[:, ::3], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("path")
def test_many_pairs_at_the_end_of_the_range() -> None:
    """No exponential of exp(84) overflows, a sum of 300 of them does."""
    q, k = torch.zeros(1, 1, 1, 400), torch.zeros(1, 300, 1, 400)
    k[..., 3] = 1.0
    gain = torch.full((1, 1), 84 / math.sqrt(399), requires_grad=True)
    out, shift = relation_quadratic_shifted(q, k, PairTerms(gain), PairRule(0.0))
    assert shift is not None
    log = out.log() + shift
    assert log[0, 0, 0, 3].item() == pytest.approx(84, rel=1e-6)
    # Every channel's logarithm is gain z.
    (slope,) = torch.autograd.grad(log[..., 3].sum(), gain)
    assert slope.item() == pytest.approx(math.sqrt(399), rel=1e-5)


@pytest.mark.usefixtures("path")
def test_wide_heads_without_a_gain() -> None:
    q, k, _, grad = make_inputs(7, 7, 9000, heads=1)
    exact = relation_quadratic_log_reference(q.double(), k.double(), PairTerms(), PairRule(1e-5))
    assert exact.amax() > 90
    for x in (q, k):
        x.requires_grad_()
    log = log_mean(q, k, PairTerms(), PairRule(1e-5))
    assert row_error(log.detach(), exact) < TOLERANCE
    assert all(x.isfinite().all() for x in torch.autograd.grad(log, (q, k), grad))


def test_no_shift_where_there_is_no_bound_or_no_need() -> None:
    q, gain = torch.randn(1, 5, 1, 768), torch.ones(5, 1)
    rules = (PairRule(1e-5), PairRule(1e-5, norm="none"), PairRule(1e-5, activation="elu"))
    for factor, rule in zip((None, gain, gain), rules, strict=True):
        out, shift = relation_quadratic_shifted(q, q, PairTerms(factor), rule)
        assert shift is None
        assert torch.equal(out, relation_quadratic(q, q, PairTerms(factor), rule))


def make_cache(length: int, channels: int, gain: float) -> tuple[Tensor, ...]:
    """q, cache, lengths and gain of a step, with slopes 0 and 1.5, one pair nearly one-hot; and the logarithm in float64."""
    q, cache = torch.randn(2, 2, channels), torch.randn(2, length, 2, channels)
    q[0] = -cache[0, length // 2] + 1e-3 * q[0]
    q[0, :, 5] += 10
    lengths, gains = torch.tensor([length, length // 3]), torch.tensor([[gain, gain], [1.0, gain]])
    exact = [
        relation_quadratic_log_reference(
            q[b, None, None].double(),
            cache[b, None, : lengths[b]].double(),
            PairTerms(gains[b, None].double(), slope=torch.tensor([0.0, 1.5])),
            PairRule(1e-5),
        )[0, 0]
        for b in range(2)
    ]
    return q, cache, lengths, gains, torch.stack(exact)


@pytest.mark.parametrize(
    ("length", "channels", "gain"),
    [(150, CHANNELS, GAIN), (70, 1000, 10.0), pytest.param(50_000, 64, 40.0, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("path")
def test_step(length: int, channels: int, gain: float) -> None:
    q, cache, lengths, gains, exact = make_cache(length, channels, gain)
    terms = PairTerms(gains, slope=torch.tensor([0.0, 1.5]))
    out, shift = relation_quadratic_step(q, cache, lengths, terms, PairRule(1e-5))
    assert shift is not None
    assert exact.amax() > 88
    # The only row that stays in range.
    assert not shift[1, 0].any()
    assert shift[0].all()
    assert row_error(out.log() + shift, exact) < 2e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogMeanExpRelation(24, CHANNELS, 1, gain=LearnedGain(1, GAIN)),
        lambda: LogMeanExpRelation(24, CHANNELS, 2, gain=LearnedGain(2, 9.0), bias=PairBias([0.5, 0.0])),
        lambda: PositionalRelation(24, CHANNELS, 1, gain=LearnedGain(1, GAIN)),
        lambda: PositionalRelation(24, CHANNELS, 2, gain=LearnedGain(2, GAIN), norm="rms"),
        # In range, but the norm that follows squares exp(55).
        lambda: QuadraticRelation(24, CHANNELS),
    ],
)
@pytest.mark.usefixtures("path")
def test_mixers(make: Any) -> None:
    """Values and gradients as in float64, whose range is ten times as large, whole and step by step."""
    mixer = make()
    mixer.reset_parameters(1)
    x = torch.randn(1, 12, 24)
    # What the last position asks for is the opposite of the first key, but for one channel.
    with torch.no_grad():
        q, k = mixer.project(x)
        mixer.q_proj.bias += (-k[0, 0] - q[0, -1]).flatten()
        mixer.q_proj.bias[4] += 1
    wide = make().double()
    wide.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        # A projection in float32 would leave an error of its own in the pair that cancels.
        pair = torch.stack(mixer.project(x))
    pair.requires_grad_()
    y, exact = (each.combine(each.relate(*pair.to(each.out_proj.weight.dtype))) for each in (mixer, wide))
    assert row_error(y.detach(), exact.detach()) < 1e-4
    grad = torch.randn(y.shape)
    (dpair,) = torch.autograd.grad((y * grad).sum(), pair)
    (exact_dpair,) = torch.autograd.grad((exact * grad).sum(), pair)
    if type(mixer) is PositionalRelation:
        # The norm of a nearly one-hot row erases its gradient but for differences of rounding.
        assert dpair.isfinite().all()
    else:
        assert row_error(dpair.flatten(), exact_dpair.flatten()) < 1e-4
    with torch.no_grad():
        q, k = pair
        last = mixer.combine(mixer.relate_step(q[:, -1], k, torch.tensor([12]))[:, None])
    torch.testing.assert_close(last[:, 0], y[:, -1], rtol=1e-4, atol=1e-5)
