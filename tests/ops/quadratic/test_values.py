"""The quadratic relation against its definition in float64: values and every gradient, on every path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrn.ops import PairRule, PairTerms, relation_quadratic
from causalrn.ops.reference import Norm, relation_quadratic_reference
from tests.ops.quadratic.settings import terms_and_rule

EVERY_SETTING: dict[str, dict[str, Any]] = {
    "default": {},
    "bidirectional": {"causal": False},
    "rms": {"norm": "rms"},
    "none": {"norm": "none"},
    "relu": {"activation": "relu"},
    "elu": {"activation": "elu"},
    "gelu": {"activation": "gelu"},
    "none_gelu": {"norm": "none", "activation": "gelu", "causal": False},
    "gain": {"gain": 1.5},
    "window": {"window": [5, 1, 1000]},
    "window_bidirectional": {"window": [5, 1, 1000], "causal": False},
    "slope": {"slope": [0.1, 0.0, 60.0]},
    "all": {"gain": 2.0, "window": [20, 1, 1000], "slope": [0.1, 0.0, 60.0], "causal": False},
    "all_elu_rms": {"gain": 2.0, "window": [20, 1, 1000], "activation": "elu", "norm": "rms"},
}
# One rounding of the sums, in units of the largest element; below it errors are luck.
FLOOR = 1e-6


def make_inputs(shape: tuple[int, int, int, int, int], gain: bool) -> list[Tensor]:
    """grad, q, k and (if asked for) gain in float32, q and k with offsets for the norm to remove."""
    batch, n_queries, n_keys, heads, channels = shape
    grad, q = torch.randn(2, batch, n_queries, heads, channels)
    k = torch.randn(batch, n_keys, heads, channels)
    return [grad, q + 1, 2 * k - 1, *([0.5 + torch.rand(n_queries, heads)] if gain else [])]


def value_and_gradients(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    dtype: torch.dtype,
    eps: float,
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """The value and the gradients of q, k and gain; all but gain in `dtype`, which is then at least float32."""
    grad, q, k = (x.to(dtype) for x in inputs[:3])
    leaves = [q.requires_grad_(), k.requires_grad_()]
    arguments = {name: value for name, value in settings.items() if name not in PairTerms._fields}
    heads, wide = q.shape[2], torch.promote_types(dtype, torch.float32)
    if "gain" in settings:
        # The plain formula multiplies in one dtype.
        plain = function is relation_quadratic_reference
        gain = (settings["gain"] * inputs[3]).to(dtype if plain else wide).requires_grad_()
        arguments["gain"] = gain
        leaves.append(gain)
    if "window" in settings:
        arguments["window"] = torch.tensor(settings["window"][:heads], dtype=torch.int32)
    if "slope" in settings:
        arguments["slope"] = torch.tensor(settings["slope"][:heads]).to(wide)
    out = function(q, k, *terms_and_rule(eps=eps, **arguments))
    names = ("out", "dq", "dk", "dgain")
    return dict(zip(names, (out.detach(), *torch.autograd.grad(out, leaves, grad)), strict=False))


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest error, in units of the largest element."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def check(
    inputs: list[Tensor],
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    eps: float = 0.1,
    floor: float = FLOOR,
) -> None:
    """At most twice the error of the plain formula in the same dtype."""
    rounded = [*(x.to(dtype) for x in inputs[:3]), *inputs[3:]]
    exact = value_and_gradients(relation_quadratic_reference, rounded, torch.float64, eps, settings)
    plain = value_and_gradients(relation_quadratic_reference, rounded, dtype, eps, settings)
    ours = value_and_gradients(relation_quadratic, rounded, dtype, eps, settings)
    for name, wanted in exact.items():
        assert ours[name].isfinite().all(), name
        bound = 2 * error(plain[name], wanted) + floor
        assert error(ours[name], wanted) <= bound, f"{name}: {error(ours[name], wanted):.2e} > {bound:.2e}"


@pytest.mark.parametrize("name", EVERY_SETTING)
@pytest.mark.usefixtures("path")
def test_every_setting(name: str) -> None:
    settings = EVERY_SETTING[name]
    check(make_inputs((2, 40, 61, 3, 19), "gain" in settings), settings)


@pytest.mark.parametrize("name", ["default", "all", "none_gelu"])
@pytest.mark.usefixtures("path")
def test_bfloat16(name: str) -> None:
    settings = EVERY_SETTING[name]
    check(make_inputs((2, 40, 61, 3, 19), "gain" in settings), settings, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 2),
        (3, 63, 63, 1, 2),
        (2, 63, 63, 2, 16),
        (1, 1, 70, 3, 33),
        (1, 500, 500, 1, 24),
        (1, 9, 12, 1, 4096),
        (5, 17, 17, 7, 3),
    ],
    ids=str,
)
@pytest.mark.usefixtures("path")
def test_every_size(shape: tuple[int, int, int, int, int]) -> None:
    check(make_inputs(shape, False), {})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.usefixtures("path")
def test_length_1000(causal: bool, dtype: torch.dtype) -> None:
    check(make_inputs((1, 1000, 1000, 1, 16), False), {"causal": causal}, dtype)


@pytest.mark.usefixtures("path")
def test_official_eps_of_zero() -> None:
    check(make_inputs((1, 50, 50, 2, 24), False), {}, eps=0.0)


@pytest.mark.usefixtures("path")
def test_large_gains_overflow_to_infinity_and_zero() -> None:
    q, k = torch.randn(2, 1, 20, 1, 64)
    for factor, overflows in ((200.0, True), (18.0, False)):
        gain = torch.full((20, 1), factor)
        exact = relation_quadratic_reference(q.double(), k.double(), PairTerms(gain.double()), PairRule(1e-5))
        ours = relation_quadratic(q, k, PairTerms(gain), PairRule(1e-5))
        small, large = exact < 1e36, exact > 1e40
        assert ours[large].isinf().all()
        # The argument of exp, up to 88, has lost digits to its own rounding.
        torch.testing.assert_close(ours[small].double(), exact[small], rtol=1e-4, atol=1e-30)
        assert large.any() == overflows


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "shape", [(1, 200, 200, 1, 24), (3, 50, 90, 2, 24), (2, 3, 9000, 1, 24), (1, 20, 6000, 1, 24)], ids=str
)
def test_threads_share_the_work(shape: tuple[int, int, int, int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = make_inputs(shape, True)
        check(inputs, EVERY_SETTING["gain"])
        first, second = (
            value_and_gradients(relation_quadratic, inputs, torch.float32, 0.1, EVERY_SETTING["gain"])
            for _ in range(2)
        )
    finally:
        torch.set_num_threads(before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kind", ["cancelling", "large", "large_cancelling", "offset"])
@pytest.mark.parametrize("channels", [16, 192])
@pytest.mark.usefixtures("path")
def test_adversarial_pairs(kind: str, channels: int) -> None:
    """No worse than twice the plain formula where digits are lost, with finite gradients."""
    shape = (2, 48, 1, channels)
    k, noise = torch.randn(2, *shape)
    scale = 1e4 if kind.startswith("large") else 1.0
    k = k * scale
    q = {
        "cancelling": -k + 1e-3 * noise,
        "large": scale * noise,
        "large_cancelling": -k + 1e-3 * scale * noise,
        # Means a thousand times the deviations.
        "offset": noise + 1000,
    }[kind]
    grad = torch.randn(shape)
    check([grad, q, k], {}, eps=1e-3, floor=2e-6)


@pytest.mark.usefixtures("path")
def test_pairs_without_deviation() -> None:
    """The plain formula's gradient is NaN there: the eager path in float64, held by gradcheck, stands in."""
    inputs = make_inputs((2, 48, 48, 1, 64), False)
    for x in inputs[1:]:
        x[:, ::2] = torch.randn(2, 24, 1, 1)
    exact = value_and_gradients(relation_quadratic, inputs, torch.float64, 1e-3, {})
    definition = relation_quadratic_reference(
        inputs[1].double(), inputs[2].double(), PairTerms(), PairRule(1e-3)
    )
    torch.testing.assert_close(exact["out"], definition)
    for name, actual in value_and_gradients(relation_quadratic, inputs, torch.float32, 1e-3, {}).items():
        # One rounding of a mean is amplified by 1 / eps on the eager path, as in the plain formula.
        assert error(actual, exact[name]) < 2e-4, name


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.usefixtures("path")
def test_gradient_where_a_pair_is_zero(norm: Norm) -> None:
    k, grad = torch.randn(2, 1, 1, 1, 24)
    leaves = [(-k).requires_grad_(), k.clone().requires_grad_()]
    out = relation_quadratic(leaves[0], leaves[1], PairTerms(), PairRule(0.5, norm=norm))
    assert torch.equal(out, torch.ones_like(out))
    wanted = (grad - grad.mean() if norm == "layer" else grad) / 0.5
    for actual in torch.autograd.grad(out, leaves, grad):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("n_keys", [30, 41])
@pytest.mark.usefixtures("path")
def test_nothing_comes_from_the_future(n_keys: int) -> None:
    q, k = torch.randn(1, 30, 1, 24, requires_grad=True), torch.randn(1, n_keys, 1, 24, requires_grad=True)
    out = relation_quadratic(q, k, PairTerms(), PairRule(1e-5))
    for i in range(0, 30, 7):
        dq, dk = torch.autograd.grad(out[0, i].square().sum(), (q, k), retain_graph=True)
        reached = torch.arange(n_keys) <= i + n_keys - 30
        assert torch.equal(dk[0, :, 0].abs().sum(-1) > 0, reached)
        assert torch.equal(dq[0, :, 0].abs().sum(-1) > 0, torch.arange(30) == i)


@pytest.mark.usefixtures("path")
def test_parts_of_the_queries_equal_the_whole() -> None:
    q, k = torch.randn(2, 2, 50, 2, 24)
    whole = relation_quadratic(q, k, PairTerms(), PairRule(1e-5))
    parts = [
        relation_quadratic(q[:, i : i + 10], k[:, : i + 10], PairTerms(), PairRule(1e-5))
        for i in range(0, 50, 10)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("path")
def test_strides_are_free() -> None:
    q = torch.randn(2, 3, 24, 20).permute(0, 3, 1, 2)
    k = torch.randn(2, 20, 3, 48)[..., ::2]
    grad = torch.randn(24).expand(2, 20, 3, 24)
    check([grad, q, k], {})


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8)], ids=str)
@pytest.mark.usefixtures("path")
def test_empty(shape: tuple[int, int, int, int]) -> None:
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(shape[0], 5, *shape[2:], requires_grad=True)
    gain = torch.ones(shape[1], shape[2], requires_grad=True)
    out = relation_quadratic(q, k, PairTerms(gain), PairRule(1e-5))
    gradients = torch.autograd.grad(out.sum(), (q, k, gain))
    assert out.shape == q.shape
    assert all(not gradient.any() for gradient in gradients)
