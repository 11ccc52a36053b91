"""The linear relation as a PyTorch operator: registration, gradcheck, torch.compile, autocast, memory kept for backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from causalrn.ops import relation_linear
from causalrn.ops.reference import LinearState

OPERATORS = torch.ops.causalrn


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_state", [True, False])
def test_registration(dtype: torch.dtype, with_state: bool) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    q, k = (torch.randn(2, 5, 2, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    total = torch.rand(2, 2, 4, dtype=wide, requires_grad=True) if with_state else None
    dy, dtotal = torch.randn(2, 5, 2, 4, dtype=dtype), torch.randn(2, 2, 4, dtype=wide)
    detached = (q.detach(), k.detach(), None if total is None else total.detach())
    torch.library.opcheck(OPERATORS.relation_linear, (q, k, total, 1e-3, True, "layer"))
    torch.library.opcheck(OPERATORS.relation_linear_backward, (dy, dtotal, *detached, 1e-3, True, "layer"))
    torch.library.opcheck(OPERATORS.relation_linear_total, (k, 1e-3, "rms"))
    torch.library.opcheck(OPERATORS.relation_linear_total_backward, (dtotal, detached[1], 1e-3, "rms"))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradcheck(norm: str, causal: bool) -> None:
    q, k = (torch.randn(2, 7, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    total = torch.rand(2, 2, 3, dtype=torch.float64, requires_grad=True)

    def function(q: Tensor, k: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        return OPERATORS.relation_linear(q, k, total, 0.2, causal, norm)

    assert torch.autograd.gradcheck(function, (q, k, total))
    assert torch.autograd.gradcheck(lambda k: OPERATORS.relation_linear_total(k, 0.2, norm), (k,))


def test_second_derivative_is_refused() -> None:
    q = torch.randn(1, 4, 1, 3, requires_grad=True)
    y, _ = relation_linear(q, q, eps=1e-3)
    (grad,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@pytest.mark.usefixtures("unchecked_shapes")
def test_compiles_into_one_graph() -> None:
    def function(q: Tensor, k: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        y, state = relation_linear(q * 2, k, LinearState(total, torch.zeros(2)), eps=1e-4)
        return y + 1, state.total * state.count[:, None, None]

    inputs = [torch.randn(2, 33, 2, 8, requires_grad=True) for _ in range(2)]
    inputs.append(torch.rand(2, 2, 8, requires_grad=True))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(
        values_and_gradients(compiled, inputs), values_and_gradients(function, inputs), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def values_and_gradients(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    outputs = function(*inputs)
    loss = torch.stack([output.sin().sum() for output in outputs]).sum()
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def test_autocast_stores_bfloat16_and_sums_float32() -> None:
    projection = nn.Linear(12, 16)
    x = torch.randn(2, 30, 12)
    with torch.autocast("cpu", torch.bfloat16):
        q = projection(x).view(2, 30, 2, 8)
        y, state = relation_linear(q, q, eps=1e-5)
        again, after = relation_linear(q, q, state, eps=1e-5)
    assert (y.dtype, again.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (state.total.dtype, after.total.dtype) == (torch.float32, torch.float32)
    (y.float().square() * again).sum().backward()
    assert projection.weight.grad is not None
    assert projection.weight.grad.isfinite().all()


class LinearBlock(nn.Module):
    """In-projections, operator and out-projection alone."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(d_model, d_hidden), nn.Linear(d_model, d_hidden, bias=False)
        self.out_proj = nn.Linear(d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (projection(x)[:, :, None] for projection in (self.q_proj, self.k_proj))
        y, _ = relation_linear(q, k, eps=1e-5)
        return self.out_proj(y[:, :, 0])


def test_a_block_keeps_only_q_k_and_the_input_of_out_proj() -> None:
    batch, length, d_model, d_hidden = 2, 64, 24, 96
    block = LinearBlock(d_model, d_hidden)
    parameters = {parameter.data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(torch.randn(batch, length, d_model))
    wide, narrow = (4 * batch * length * size for size in (d_hidden, d_model))
    # q, k for the operator, y for out_proj's weight, x for those of q_proj and k_proj.
    assert sorted(kept.values()) == [narrow, wide, wide, wide]
    assert sum(kept.values()) == 3 * wide + narrow
    y.sum().backward()
