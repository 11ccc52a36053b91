"""The quadratic relation's Triton kernels against its definition in float64: values and every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrn.ops.pairs import Activation, Norm, PairRule, PairTerms
from causalrn.ops.reference import relation_quadratic_reference
from tests.ops.quadratic.settings import terms_and_rule
from tests.ops.triton_device import (
    DEVICE,
    INTERPRETED,
    assert_passes_interpreted,
    needs_device,
    relative_error,
    starts_interpreter,
)

# Float32 against float64, relative to the largest element: rounding of statistics and exponents, a few units each.
TOLERANCE = 2e-6


@starts_interpreter
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_under_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


def differentiate_definition(
    q: Tensor, k: Tensor, grad: Tensor, dtype: torch.dtype, gain: Tensor | None = None, **settings: Any
) -> dict[str, Tensor]:
    leaves = {"dq": q, "dk": k} | ({} if gain is None else {"dgain": gain})
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
    rest = terms_and_rule(gain=leaves.get("dgain"), **settings)
    out = relation_quadratic_reference(leaves["dq"], leaves["dk"], *rest)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def differentiate_kernels(q: Tensor, k: Tensor, grad: Tensor, **settings: Any) -> dict[str, Tensor]:
    from causalrn.ops.quadratic import gpu as quadratic_triton

    terms, rule = terms_and_rule(**settings)
    out = quadratic_triton.forward(q, k, terms, rule)
    dq, dk, dgain = quadratic_triton.backward(grad, q, k, terms, rule)
    assert out.dtype == dq.dtype == dk.dtype == q.dtype
    assert (dgain is None) == (terms.gain is None)
    if dgain is None:
        return {"out": out, "dq": dq, "dk": dk}
    assert dgain.dtype == torch.float32
    return {"out": out, "dq": dq, "dk": dk, "dgain": dgain}


def make_inputs(batch: int, n_queries: int, n_keys: int, heads: int, channels: int) -> tuple[Tensor, ...]:
    """q, k and the gradient of the result, with offsets and scales that the norm has to remove."""
    q = 2 * torch.randn(batch, n_queries, heads, channels, device=DEVICE) + 1
    k = torch.randn(batch, n_keys, heads, channels, device=DEVICE) - 0.5
    return q, k, torch.randn_like(q)


def assert_equals_definition(q: Tensor, k: Tensor, grad: Tensor, **settings: Any) -> None:
    actual = differentiate_kernels(q, k, grad, **settings)
    wanted = differentiate_definition(q, k, grad, torch.float64, **settings)
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].shape == value.shape
        assert relative_error(actual[name], value) < TOLERANCE, name


def make_options(names: str, n_queries: int, heads: int) -> dict[str, Tensor]:
    """Per query and head or per head: uneven, with a gain of 0 and a window of 1 among them."""
    gain = torch.linspace(0, 2, n_queries * heads, device=DEVICE).view(n_queries, heads)
    window = torch.tensor([1, 9, 40], dtype=torch.int32, device=DEVICE)[-heads:]
    slope = torch.tensor([0.3, 0.0, 0.1], device=DEVICE)[:heads]
    options = {"gain": gain, "window": window.contiguous(), "slope": slope}
    return {name: options[name] for name in names.split()}


# Lanes behind the last position divide 0 by 0, which only the interpreter notices; nothing of theirs is kept.
@needs_device
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.usefixtures("poisoned_empty")
class TestKernels:
    @pytest.mark.parametrize("norm", ["layer", "rms", "none"])
    @pytest.mark.parametrize(
        ("options", "causal"),
        [
            ("", True),
            ("", False),
            ("gain", True),
            ("window", False),
            ("slope", True),
            ("gain window slope", True),
            ("gain window slope", False),
        ],
    )
    def test_exponentials(self, norm: Norm, options: str, causal: bool) -> None:
        q, k, grad = make_inputs(1, 17, 25, 2, 24)
        assert_equals_definition(
            q / 2, k / 2, grad, eps=1e-3, norm=norm, causal=causal, **make_options(options, 17, 2)
        )

    @pytest.mark.parametrize("activation", ["relu", "elu", "gelu"])
    @pytest.mark.parametrize(
        ("norm", "options"), [("layer", ""), ("layer", "gain window slope"), ("rms", "gain"), ("none", "")]
    )
    def test_other_activations(self, norm: Norm, activation: Activation, options: str) -> None:
        q, k, grad = make_inputs(1, 17, 25, 3, 16)
        assert_equals_definition(
            q, k, grad, eps=1e-3, norm=norm, activation=activation, **make_options(options, 17, 3)
        )

    @pytest.mark.parametrize(
        ("batch", "length", "heads", "channels"),
        [(1, 1, 1, 16), (3, 1, 2, 2), (1, 63, 1, 33), (2, 40, 1, 24), (1, 130, 1, 16), (1, 9, 1, 192)],
    )
    def test_sizes(self, batch: int, length: int, heads: int, channels: int) -> None:
        # Two channels normalise to +1 and -1, without any gradient but through eps.
        eps = 0.5 if channels == 2 else 0.0
        assert_equals_definition(*make_inputs(batch, length, length, heads, channels), eps=eps)

    def test_continuing_a_sequence(self) -> None:
        """The last queries alone give the last rows of the whole."""
        q, k, grad = make_inputs(1, 70, 70, 1, 16)
        whole = differentiate_kernels(q, k, grad, eps=0.0)["out"]
        part = differentiate_kernels(q[:, -3:].contiguous(), k, grad[:, -3:], eps=0.0)["out"]
        torch.testing.assert_close(part, whole[:, -3:])

    def test_strided_inputs(self) -> None:
        q, k, grad = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in make_inputs(1, 17, 17, 2, 24))
        assert q.stride(-1) != 1
        fused = torch.cat([q, k], 3)
        assert_equals_definition(q, k, grad, eps=0.0, gain=torch.rand(17, 1, device=DEVICE).expand(-1, 2))
        assert_equals_definition(fused[..., :24], fused[..., 24:], grad, eps=0.0)

    @pytest.mark.parametrize("norm", ["layer", "rms", "none"])
    def test_bfloat16_storage(self, norm: Norm) -> None:
        """No further from float64 than twice plain PyTorch in bfloat16."""
        q, k, grad = (x.bfloat16() for x in make_inputs(1, 33, 33, 2, 32))
        actual = differentiate_kernels(q, k, grad, eps=1e-3, norm=norm)
        wanted = differentiate_definition(q, k, grad, torch.float64, eps=1e-3, norm=norm)
        plain = differentiate_definition(q, k, grad, torch.bfloat16, eps=1e-3, norm=norm)
        for name, value in wanted.items():
            assert relative_error(actual[name], value) <= 2 * relative_error(plain[name], value), name
            # Rounding the result to bfloat16's 8 digits is all that is lost; the interpreter cuts instead.
            assert relative_error(actual[name], value) < (2**-7 if INTERPRETED else 2**-8), name

    @pytest.mark.parametrize("norm", ["layer", "rms"])
    @pytest.mark.parametrize(
        "spoil",
        [
            lambda q, k: (1e-3 * q - k, k),
            lambda q, k: (1e-5 * q - k, k),
            lambda q, k: (1e-2 * q - k - 30, k + 30),
            lambda q, k: (1e4 * q, 1e4 * k),
            lambda q, k: (q.abs() * 1e-4, k * 1e4),
        ],
        ids=["cancelling", "nearly vanishing", "cancelling offsets", "large", "uneven"],
    )
    def test_hard_numbers(self, spoil: Callable, norm: Norm) -> None:
        """Errors against float64 no worse than twice those of plain float32 PyTorch."""
        q, k, grad = make_inputs(1, 24, 24, 1, 48)
        q, k = spoil(q, k)
        actual = differentiate_kernels(q, k, grad, eps=0.0, norm=norm)
        wanted = differentiate_definition(q, k, grad, torch.float64, eps=0.0, norm=norm)
        plain = differentiate_definition(q, k, grad, torch.float32, eps=0.0, norm=norm)
        for name, value in wanted.items():
            # Some units of rounding are noise: plain PyTorch reaches one by luck.
            bound = 2 * relative_error(plain[name], value) + 4 * torch.finfo(torch.float32).eps
            assert relative_error(actual[name], value) <= bound, name

    @pytest.mark.parametrize("norm", ["layer", "rms"])
    def test_constant_rows_stay_finite(self, norm: Norm) -> None:
        """Where pairs have no spread at all, eps > 0 promises finite values and gradients."""
        q, k, grad = make_inputs(1, 17, 17, 1, 16)
        for q_hard, k_hard in ((-k, k), (0 * q, 0 * k), (0 * q + 0.3, 0 * k + 0.7)):
            actual = differentiate_kernels(q_hard, k_hard, grad, eps=1e-3, norm=norm)
            assert all(x.isfinite().all() for x in actual.values())
            wanted = relation_quadratic_reference(
                q_hard.double(), k_hard.double(), PairTerms(), PairRule(1e-3, norm=norm)
            )
            assert relative_error(actual["out"], wanted) < TOLERANCE

    def test_repeats_to_the_bit(self) -> None:
        """No atomics: the order of sums does not depend on the schedule."""
        # The interpreter runs one program after the other.
        inputs = make_inputs(1, 20, 20, 1, 16) if INTERPRETED else make_inputs(2, 100, 100, 1, 16)
        first, second = (differentiate_kernels(*inputs, eps=0.0) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
