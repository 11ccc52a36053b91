"""The linear relation's Triton kernels against its definition in float64: values, states and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from causalrn.ops.linear.operator import LinearNorm
from causalrn.ops.reference import LinearState, relation_linear_reference
from tests.ops.triton_device import (
    DEVICE,
    INTERPRETED,
    assert_passes_interpreted,
    needs_device,
    relative_error,
    starts_interpreter,
)

# Float32 against float64, relative to the largest element: rounding of statistics, exponents and sums.
TOLERANCE = 2e-6


@starts_interpreter
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_under_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]


def make_inputs(
    batch: int, length: int, heads: int, channels: int, *, state: bool = True, factor: float = 1.0
) -> Inputs:
    """q, k, total, dy and dtotal, with offsets and scales that the norms have to remove."""
    shape = (batch, length, heads, channels)
    q, k, dy = (factor * torch.randn(shape, device=DEVICE) for _ in range(3))
    total, dtotal = torch.rand(2, batch, heads, channels, device=DEVICE)
    return 2 * q + 1, 3 * k - 1, 5 * total if state else None, dy, dtotal if state else None


def differentiate_definition(
    q: Tensor, k: Tensor, total: Tensor | None, dy: Tensor, dtotal: Tensor | None, dtype: torch.dtype, **settings: Any
) -> dict[str, Tensor]:  # fmt: skip
    if total is None:
        # Sums before the first position are 0: that leaves a place to differentiate with respect to.
        total = torch.zeros_like(q[:, 0], dtype=torch.float32)
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, total)]
    state = LinearState(leaves[2], torch.zeros(q.shape[:1]))
    y, after = relation_linear_reference(leaves[0], leaves[1], state, **settings)
    dtotal = torch.zeros_like(total) if dtotal is None else dtotal
    dq, dk, dtotal_in = torch.autograd.grad((y, after.total), leaves, (dy.to(dtype), dtotal.to(dtype)))
    return {"y": y.detach(), "total": after.total.detach(), "dq": dq, "dk": dk, "dtotal": dtotal_in}


def differentiate_kernels(
    q: Tensor, k: Tensor, total: Tensor | None, dy: Tensor, dtotal: Tensor | None,
    *, eps: float, causal: bool = True, norm: LinearNorm = "layer",
) -> dict[str, Tensor]:  # fmt: skip
    from causalrn.ops.linear import gpu as linear_triton

    y, after = linear_triton.forward(q, k, total, eps, causal, norm)
    dq, dk, dtotal_in = linear_triton.backward(dy, dtotal, q, k, total, eps, causal, norm)
    assert y.dtype == dq.dtype == dk.dtype == q.dtype
    assert after.dtype == dtotal_in.dtype == torch.float32
    return {"y": y, "total": after, "dq": dq, "dk": dk, "dtotal": dtotal_in}


def assert_equals_definition(inputs: Inputs, **settings: Any) -> None:
    actual = differentiate_kernels(*inputs, **settings)
    wanted = differentiate_definition(*inputs, torch.float64, **settings)
    for name, value in wanted.items():
        assert actual[name].shape == value.shape
        assert relative_error(actual[name], value) < TOLERANCE, name


@needs_device
@pytest.mark.usefixtures("poisoned_empty")
class TestKernels:
    @pytest.mark.parametrize("eps", [0.0, 1e-2])
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("norm", ["layer", "rms"])
    def test_settings(self, norm: LinearNorm, causal: bool, eps: float) -> None:
        assert_equals_definition(make_inputs(1, 17, 2, 33), norm=norm, causal=causal, eps=eps)

    @pytest.mark.parametrize(
        ("batch", "length", "heads", "channels"),
        [(2, 1, 1, 16), (1, 1, 3, 7), (1, 63, 1, 24), (2, 16, 1, 64), (1, 5, 1, 768), (1, 2, 3, 1030)],
    )
    def test_sizes(self, batch: int, length: int, heads: int, channels: int) -> None:
        """From one block to several, from one warp and vector per row to many, the last of them shifted."""
        assert_equals_definition(make_inputs(batch, length, heads, channels, state=False), eps=0.0)

    def test_part_by_part(self) -> None:
        """The returned sum carries a sequence on, and its gradient comes back."""
        q, k, total, dy, dtotal = make_inputs(1, 19, 1, 16)
        whole = differentiate_kernels(q, k, total, dy, dtotal, eps=1e-3)
        first, second = slice(0, 7), slice(7, None)
        from causalrn.ops.linear import gpu as linear_triton

        _, middle = linear_triton.forward(q[:, first], k[:, first], total, 1e-3, True, "layer")
        last = differentiate_kernels(q[:, second], k[:, second], middle, dy[:, second], dtotal, eps=1e-3)
        start = differentiate_kernels(q[:, first], k[:, first], total, dy[:, first], last["dtotal"], eps=1e-3)
        for name in ("y", "dq", "dk"):
            assert relative_error(torch.cat([start[name], last[name]], 1), whole[name]) < TOLERANCE, name
        assert relative_error(last["total"], whole["total"]) < TOLERANCE
        assert relative_error(start["dtotal"], whole["dtotal"]) < TOLERANCE

    def test_strided_inputs(self) -> None:
        q, k, total, dy, dtotal = make_inputs(2, 9, 2, 16)
        fused = torch.cat([q, k], 3)
        assert_equals_definition((fused[..., :16], fused[..., 16:], total, dy, dtotal), eps=0.0)
        q, k, dy = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, dy))
        assert q.stride(-1) != 1
        assert_equals_definition((q, k, total, dy, dtotal), eps=0.0)

    @pytest.mark.parametrize("norm", ["layer", "rms"])
    def test_bfloat16_storage(self, norm: LinearNorm) -> None:
        """No further from float64 than twice plain PyTorch in bfloat16."""
        q, k, total, dy, dtotal = make_inputs(1, 33, 1, 32)
        q, k, dy = q.bfloat16(), k.bfloat16(), dy.bfloat16()
        actual = differentiate_kernels(q, k, total, dy, dtotal, eps=1e-3, norm=norm)
        wanted = differentiate_definition(q, k, total, dy, dtotal, torch.float64, eps=1e-3, norm=norm)
        plain = differentiate_definition(q, k, total, dy, dtotal, torch.bfloat16, eps=1e-3, norm=norm)
        for name, value in wanted.items():
            assert relative_error(actual[name], value) <= 2 * relative_error(plain[name], value), name
            # A rounding to bfloat16's 8 digits, two in dk; the interpreter cuts instead of rounding.
            assert relative_error(actual[name], value) < (2**-6 if INTERPRETED else 2**-7), name

    def test_spikes_do_not_overflow(self) -> None:
        """One channel alone reaches exponents of sqrt(D - 1), 64 at the widest, in q and in k."""
        q, k, total, dy, dtotal = make_inputs(1, 4, 1, 4096, state=False, factor=1e-4)
        for position, (at_q, at_k) in enumerate([(0, 0), (5, 7), (7, 5), (1, 0)]):
            q[0, position, 0, at_q] += 100
            k[0, position, 0, at_k] += 100
        actual = differentiate_kernels(q, k, total, dy, dtotal, eps=0.0)
        wanted = differentiate_definition(q, k, total, dy, dtotal, torch.float64, eps=0.0)
        for name in ("y", "total"):
            # An exponent of 64 turns each of the roundings in it (mean, deviation, quotient, product) into 64.
            assert relative_error(actual[name], wanted[name]) < 64 * 4 * torch.finfo(torch.float32).eps, name
        assert all(x.isfinite().all() for x in actual.values())

    @pytest.mark.parametrize("norm", ["layer", "rms"])
    def test_constant_rows_stay_finite(self, norm: LinearNorm) -> None:
        """Where rows have no spread, eps > 0 promises finite values and gradients."""
        q, k, _, dy, dtotal = make_inputs(1, 5, 1, 16)
        actual = differentiate_kernels(0 * q + 3, 0 * k, None, dy, dtotal, eps=1e-3, norm=norm)
        assert all(x.isfinite().all() for x in actual.values())
