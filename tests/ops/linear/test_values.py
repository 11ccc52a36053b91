"""The linear relation against its definition in float64: values, states and every gradient, on every path."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrn.ops import relation_linear, relation_linear_step
from causalrn.ops.linear import operator as linear
from causalrn.ops.linear.operator import relation_linear_total
from causalrn.ops.reference import LinearState, normalise, relation_linear_reference
from tests.ops.paths import PATHS, use_path

# Float32 against float64, relative to the largest element: rounding of statistics, exponents up to about 5 and sums.
TOLERANCE = 1e-5


def make_inputs(
    batch: int, length: int, heads: int, channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, total, dy and dtotal in float32, with offsets and scales that the normalisations have to remove."""
    shape = (batch, length, heads, channels)
    q, k = 2 * torch.randn(shape) + 1, 3 * torch.randn(shape) - 1
    total = 5 * torch.rand(batch, heads, channels)
    return q, k, total, torch.randn(shape), torch.randn(batch, heads, channels)


def differentiate(
    function: Callable, inputs: Sequence[Tensor], dtype: torch.dtype, **settings: Any
) -> dict[str, Tensor]:
    """Value, final state and gradients; q, k, dy in `dtype`, states in float32 (float64 with float64)."""
    q, k, total, dy, dtotal = (
        x.to(torch.promote_types(dtype, torch.float32) if x.dim() == 3 else dtype) for x in inputs
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, total)]
    state = LinearState(leaves[2], torch.full(q.shape[:1], 7.0))
    y, after = function(leaves[0], leaves[1], state, **settings)
    gradients = torch.autograd.grad((y, after.total), leaves, (dy, dtotal))
    names = ("y", "total", "dq", "dk", "dtotal")
    return {**dict(zip(names, (y, after.total, *gradients), strict=True)), "count": after.count}


def assert_near(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (actual[name].double() - value.double()).abs().max() / value.double().abs().max()
        assert error <= tolerance, f"{name}: relative error {error:.2e}, wanted at most {tolerance:.1e}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    ("length", "heads", "channels"), [(1, 1, 7), (63, 3, 5), (500, 2, 64), (1000, 1, 33)]
)
def test_equals_definition(
    path: str, length: int, heads: int, channels: int, norm: str, causal: bool
) -> None:
    inputs = make_inputs(2, length, heads, channels)
    settings = {"eps": 1e-3, "causal": causal, "norm": norm}
    actual = differentiate(relation_linear, inputs, torch.float32, **settings)
    wanted = differentiate(relation_linear_reference, inputs, torch.float64, **settings)
    assert_near(actual, wanted, TOLERANCE)
    assert actual["total"].dtype == torch.float32


@pytest.mark.parametrize("channels", [2, 3, 8, 15, 16, 17, 31, 100, 192, 768, 1001, 4096])
def test_every_width(path: str, channels: int) -> None:
    inputs = make_inputs(2, 20, 1, channels)
    # With D = 2 the norm turns every pair into (1, -1) or (-1, 1), and eps = 0 leaves no gradient but noise.
    settings = {"eps": 0.1 if channels == 2 else 0.0}
    actual = differentiate(relation_linear, inputs, torch.float32, **settings)
    wanted = differentiate(relation_linear_reference, inputs, torch.float64, **settings)
    assert_near(actual, wanted, 3e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_every_eps(path: str, eps: float) -> None:
    inputs = make_inputs(2, 40, 2, 24)
    actual = differentiate(relation_linear, inputs, torch.float32, eps=eps)
    wanted = differentiate(relation_linear_reference, inputs, torch.float64, eps=eps)
    assert_near(actual, wanted, TOLERANCE)


def test_without_state_equals_zero_state(path: str) -> None:
    q, k, total, *_ = make_inputs(2, 50, 2, 16)
    y, state = relation_linear(q, k, eps=0)
    wanted, wanted_state = relation_linear(q, k, LinearState(torch.zeros_like(total), torch.zeros(2)), eps=0)
    assert torch.equal(y, wanted)
    assert torch.equal(state.total, wanted_state.total)
    assert torch.equal(state.count, torch.tensor([50.0, 50.0]))


@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_error_is_at_most_twice_that_of_plain_pytorch(path: str, causal: bool) -> None:
    inputs = make_inputs(2, 200, 1, 96)
    # One pass through bfloat16, so that all three see the same numbers.
    inputs = tuple(x.bfloat16().float() for x in inputs)
    settings = {"eps": 1e-5, "causal": causal}
    wanted = differentiate(relation_linear_reference, inputs, torch.float64, **settings)
    actual = differentiate(relation_linear, inputs, torch.bfloat16, **settings)
    plain = differentiate(relation_linear_reference, inputs, torch.bfloat16, **settings)
    assert actual["y"].dtype == torch.bfloat16
    for name, value in wanted.items():
        ours, theirs = ((x[name].double() - value).abs().max() for x in (actual, plain))
        assert ours <= 2 * theirs, f"{name}: {ours:.2e} against {theirs:.2e}"


def test_part_by_part_equals_whole(path: str) -> None:
    inputs = make_inputs(2, 150, 2, 20)

    def by_parts(q: Tensor, k: Tensor, state: LinearState, **settings: Any) -> tuple[Tensor, LinearState]:
        outputs = []
        for part_q, part_k in zip(q.split((1, 70, 79), 1), k.split((1, 70, 79), 1), strict=True):
            y, state = relation_linear(part_q, part_k, state, **settings)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    actual = differentiate(by_parts, inputs, torch.float32, eps=1e-4)
    assert_near(actual, differentiate(relation_linear, inputs, torch.float32, eps=1e-4), TOLERANCE)
    assert torch.equal(actual["count"], torch.tensor([157.0, 157.0]))


def test_step_by_step_equals_whole(path: str) -> None:
    q, k, total, *_ = make_inputs(3, 30, 2, 12)
    whole, _ = relation_linear(q, k, LinearState(total, torch.zeros(3)), eps=1e-4)
    state = LinearState(total, torch.zeros(3))
    for position in range(30):
        y, state = relation_linear_step(q[:, position], k[:, position], state, eps=1e-4)
        torch.testing.assert_close(y, whole[:, position], rtol=0, atol=1e-5)


def test_no_gradient_from_the_future(path: str) -> None:
    q, k, *_ = make_inputs(1, 70, 1, 9)
    for x in (q, k):
        x.requires_grad_()
    y, _ = relation_linear(q, k, eps=1e-5)
    dq, dk = torch.autograd.grad((y[:, 41] * torch.randn(9)).sum(), (q, k))
    assert dq.abs().sum((0, 2, 3)).nonzero().flatten().tolist() == [41]
    # All of them, and none after.
    assert dk.abs().sum((0, 2, 3)).nonzero().flatten().tolist() == list(range(42))


def test_large_exponents_do_not_overflow(path: str) -> None:
    """At D = 3072 a single channel that stands out reaches exp(55) in q and in k, on the same or another channel."""
    channels = 3072
    q, k, total, dy, dtotal = make_inputs(2, 40, 1, channels)
    q, k = 1e-3 * q, 1e-3 * k
    q[0, ::2, 0, 5] = k[0, ::3, 0, 5] = k[1, ::3, 0, 7] = q[1, 1::2, 0, 3000] = 1e3
    k[1, 5:, 0, 0] = -1e3
    inputs = (q, k, total, dy, dtotal)
    actual = differentiate(relation_linear, inputs, torch.float32, eps=0.0)
    wanted = differentiate(relation_linear_reference, inputs, torch.float64, eps=0.0)
    assert normalise(k.double(), "layer", 0.0).max() > 55
    # The gradient of a key row with one channel that stands out cancels to a millionth of its terms.
    assert actual.pop("dk").isfinite().all()
    del wanted["dk"]
    # A relative error of 1e-6 in the deviation of a row is one of 55e-6 in its exponential.
    assert_near(actual, wanted, 2e-4)


def test_constant_rows_have_finite_gradients(path: str) -> None:
    inputs = make_inputs(1, 5, 1, 8)
    inputs[0][:, 1], inputs[1][:, 2] = 3, 0
    for value in differentiate(relation_linear, inputs, torch.float32, eps=1e-5).values():
        assert value.isfinite().all()


def test_nan_is_not_hidden(path: str) -> None:
    q, k, *_ = make_inputs(1, 6, 1, 20)
    k[0, 3, 0, 4] = float("nan")
    y, state = relation_linear(q, k, eps=1e-5)
    assert y[0, :3].isfinite().all()
    assert y[0, 3:].isnan().all()
    assert state.total.isnan().all()


def test_strided_inputs_equal_contiguous_ones(path: str) -> None:
    wide = torch.randn(3, 80, 2, 2, 48)
    slices: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[:, 5:60, 0, :, :40],
        lambda x: x[:, ::2, 1],
        lambda x: x[..., 0, :, :].transpose(0, 1),
        lambda x: x[..., 0, :, :].transpose(2, 3),
    ]
    for cut in slices:
        q = cut(wide)
        k = q.flip(1)
        dy = q.flip(0).transpose(0, 1).contiguous().transpose(0, 1)
        total = torch.rand(q.shape[0], q.shape[3], q.shape[2]).transpose(1, 2)
        strided = (q, k, total, dy, total)
        actual = differentiate(relation_linear, strided, torch.float32, eps=0.1)
        contiguous = tuple(x.contiguous() for x in strided)
        assert_near(actual, differentiate(relation_linear, contiguous, torch.float32, eps=0.1), 0)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4)])
def test_empty(path: str, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(*shape)
    actual = differentiate(relation_linear, inputs, torch.float32, eps=1e-5)
    assert actual["y"].shape == shape
    assert torch.equal(actual["total"], inputs[2])
    assert torch.equal(actual["dtotal"], inputs[4])
    _, state = relation_linear(inputs[0], inputs[1], eps=1e-5)
    assert torch.equal(state.total, torch.zeros_like(inputs[2]))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_same_result_in_every_run_and_on_any_number_of_threads(path: str, batch: int, causal: bool) -> None:
    inputs = make_inputs(batch, 1400 // batch, 1, 128)
    results = []
    threads = torch.get_num_threads()
    for n_threads in (1, 2, 3, 3):
        torch.set_num_threads(n_threads)
        results.append(differentiate(relation_linear, inputs, torch.float32, eps=1e-5, causal=causal))
    torch.set_num_threads(threads)
    # PyTorch's own reductions, which the path without a compiler is made of, split by thread.
    assert_near(results[2], results[3], 0)
    for result in results[:2]:
        assert_near(result, results[3], TOLERANCE if path == "eager" else 0)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_total_equals_the_state_of_the_whole(path: str, norm: linear.LinearNorm) -> None:
    _, k, _, _, dtotal = make_inputs(2, 300, 2, 40)
    k64 = k.double().requires_grad_()
    wanted = normalise(k64, norm, 1e-3).exp().sum(1)
    k.requires_grad_()
    total = relation_linear_total(k, eps=1e-3, norm=norm)
    (dk,) = torch.autograd.grad(total, k, dtotal)
    (wanted_dk,) = torch.autograd.grad(wanted, k64, dtotal.double())
    assert_near({"total": total, "dk": dk}, {"total": wanted, "dk": wanted_dk}, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("path_name", PATHS)
def test_a_million_positions(path_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1e-5 of float64, values and gradients; k drifts, so that the sums cannot average rounding away."""
    use_path(path_name, monkeypatch)
    length, channels = 1_000_000, 8
    inputs = make_inputs(1, length, 1, channels)
    inputs[1][0, :, 0, 0] += torch.linspace(0, 9, length)
    wanted = differentiate(relation_linear_reference, inputs, torch.float64, eps=1e-5)
    actual = differentiate(relation_linear, inputs, torch.float32, eps=1e-5)
    assert_near(actual, wanted, TOLERANCE)
    late = slice(length - 1000, None)
    assert_near({"y": actual["y"][:, late]}, {"y": wanted["y"][:, late]}, TOLERANCE)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 4, 1, 3)}, r"got q \(2, 3, 1, 3\) and k \(2, 4, 1, 3\)"),
        ({"k": torch.zeros(2, 3, 1, 3, dtype=torch.bfloat16)}, "got q torch.float32 and k torch.bfloat16"),
        ({"norm": "none"}, "got norm 'none'"),
        ({"eps": -1.0}, "got eps -1.0"),
        ({"state": LinearState(torch.zeros(2, 1, 4), torch.zeros(2))}, r"total \(2, 1, 4\)"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"q": torch.zeros(2, 3, 1, 3), "k": torch.zeros(2, 3, 1, 3), "eps": 0.0, **change}
    with pytest.raises(ValueError, match=message):
        partial(relation_linear, **arguments)()
