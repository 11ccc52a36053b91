"""The normalisation operator against its definition in float64, on every instruction set."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from causalrn.ops.native import ISA_VARIABLE, supported_instruction_sets
from causalrn.ops.normalisation import normalise
from causalrn.ops.reference import Norm
from causalrn.ops.reference import normalise as reference


def value_and_gradient(function, x: Tensor, norm: Norm, eps: float, probe: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x, norm, eps)
    (gradient,) = torch.autograd.grad((y * probe.to(y.dtype)).sum(), x)
    return y.detach(), gradient


@pytest.fixture(params=supported_instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 7), (2, 16), (4, 33), (1, 192), (2, 3, 4096)], ids=str)
@pytest.mark.usefixtures("isa", "poisoned_empty")
def test_equals_the_definition(shape: tuple[int, ...], norm: Norm, eps: float) -> None:
    # A mean far from 0, as a residual stream may have.
    x, probe = 3 + 2 * torch.randn(shape), torch.randn(shape)
    expected = value_and_gradient(reference, x.double(), norm, eps, probe)
    for ours, wanted in zip(value_and_gradient(normalise, x, norm, eps, probe), expected, strict=True):
        # Two channels are normalised to +-1, so that their gradient is a difference of equal numbers.
        assert_close(ours.double(), wanted, atol=2e-5, rtol=2e-5)
    plain = [value_and_gradient(reference, x.bfloat16(), norm, eps, probe)]
    half = value_and_gradient(normalise, x.bfloat16(), norm, eps, probe)
    exact = value_and_gradient(reference, x.bfloat16().double(), norm, eps, probe.bfloat16())
    for ours, theirs, wanted in zip(half, plain[0], exact, strict=True):
        assert ours.dtype is torch.bfloat16
        assert (ours - wanted).norm() <= 2 * (theirs - wanted).norm() + 1e-2 * wanted.norm()


def test_float64_gradients() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: normalise(x, "layer", 0.1), x)
    assert torch.autograd.gradcheck(lambda x: normalise(x, "rms", 0.1), x)


@pytest.mark.slow
def test_operator_is_well_formed() -> None:
    for x in (torch.randn(3, 20, requires_grad=True), torch.randn(20, 3).mT, torch.randn(0, 4)):
        torch.library.opcheck(torch.ops.causalrn.normalise.default, (x, "layer", 1e-5))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_constant_rows_have_finite_gradients(norm: Norm) -> None:
    x = torch.zeros(2, 8)
    if norm == "layer":
        x[1] = 3.0
    y, gradient = value_and_gradient(normalise, x, norm, 0.1, torch.randn(2, 8))
    assert not y.any()
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_compiles_without_a_break() -> None:
    x = torch.randn(4, 12)
    assert_close(torch.compile(normalise, fullgraph=True)(x, "layer", 0.0), normalise(x, "layer", 0.0))


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("batch", 1e-5, "got norm 'batch'"),
        ("layer", -1.0, "got eps -1.0"),
        ("rms", float("nan"), "got eps nan"),
    ],
)
def test_wrong_arguments_are_named(norm: Norm, eps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalise(torch.ones(2, 3), norm, eps)
