"""The linear layer of stored weights equals the product with its widened weights, for every dtype and path."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from causalrn.ops import native
from causalrn.ops.weight_only import MAX_ROWS, WEIGHT_DTYPES, stored_linear


def make_weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randint(-128, 128, shape).to(dtype) if dtype is torch.int8 else torch.randn(shape).to(dtype)


def expected(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    wide = weight.double() * (1 if scale is None else scale.double()[:, None])
    return x.double() @ wide.T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("with_factors", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 33), (130, 259)])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (MAX_ROWS + 1,)])
def test_equals_the_product(
    dtype: torch.dtype,
    with_factors: bool,
    shape: tuple[int, int],
    rows: tuple[int, ...],
    poisoned_empty: None,
) -> None:
    x, weight = torch.randn(*rows, shape[1]), make_weight(shape, dtype)
    scale, bias = (torch.randn(shape[0]), torch.randn(shape[0])) if with_factors else (None, None)
    want = expected(x, weight, scale, bias)
    # float32 sums: a few units in the last place of the largest terms.
    tolerance = 1e-6 * float(want.abs().max()) * shape[1] ** 0.5
    assert_close(stored_linear(x, weight, scale, bias).double(), want, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("isa", native.supported_instruction_sets())
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_every_instruction_set(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    x, weight = torch.randn(3, 77), make_weight((53, 77), dtype)
    want = expected(x, weight, None, None)
    assert_close(stored_linear(x, weight).double(), want, atol=1e-5 * float(want.abs().max()), rtol=1e-5)


def test_result_does_not_depend_on_the_threads() -> None:
    x, weight = torch.randn(1, 512), torch.randn(1000, 512)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(stored_linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])


def test_other_dtypes_of_input() -> None:
    weight, scale = make_weight((6, 5), torch.int8), torch.rand(6)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.bfloat16, 0.02)):
        x = torch.randn(2, 5).to(dtype)
        out = stored_linear(x, weight, scale)
        want = expected(x, weight, scale, None)
        assert out.dtype is dtype
        assert_close(out.double(), want, atol=tolerance * float(want.abs().max()), rtol=tolerance)


def test_operator_is_well_formed() -> None:
    arguments = (torch.randn(2, 5), make_weight((6, 5), torch.int8), torch.rand(6), None)
    torch.library.opcheck(
        torch.ops.causalrn.stored_linear, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("x", "weight", "scale", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(3, 4).half(), None, "float16"),
        (torch.zeros(1, 5), torch.zeros(3, 4), None, r"x \(1, 5\) and weight \(3, 4\)"),
        (torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(4), r"scale \(4,\), wanted \(3,\)"),
    ],
)
def test_wrong_arguments_are_named(x: Tensor, weight: Tensor, scale: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stored_linear(x, weight, scale)
