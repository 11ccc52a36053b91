"""Calls the compiled CPU kernels of the linear relation."""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from causalrn.ops import native

Rows = Float[Tensor, "B T H D"]
Total = Float[Tensor, "B H D"]
# exp(sqrt(D)) and its sums are floats below; beyond, the equation itself is out of range.
MAX_CHANNELS = 5000
# Elements below which starting another thread costs more than it saves.
ELEMENTS_PER_THREAD = 2**15


class Arguments(ctypes.Structure):
    """`LinearArguments` of csrc/linear.h."""

    _fields_ = native.fields(
        pointers="q k dy y dq dk total dtotal total_out",
        int64="batch length heads channels q_batch_stride q_stride k_batch_stride k_stride dy_batch_stride dy_stride",
        float32="eps",
        int32="causal rms bf16",
    )


def serves(q: Tensor) -> bool:
    """Whether the library is there and takes tensors of this dtype and width."""
    return native.serves(q) and q.shape[3] <= MAX_CHANNELS


def forward(q: Rows, k: Rows, total: Total | None, eps: float, causal: bool, norm: str) -> tuple[Rows, Total]:
    """The operator's rows, and the sum after the last of them."""
    y, total_out = new_like(q), new_total(q)
    outputs = {"y": y, "total_out": total_out}
    call("linear_forward", {"q": q, "k": k}, {"total": total}, outputs, eps, causal, norm)
    return y, total_out


def backward(
    dy: Rows, dtotal: Total | None, q: Rows, k: Rows, total: Total | None, eps: float, causal: bool, norm: str
) -> tuple[Rows, Rows, Total]:
    """The gradients with respect to q, k and the passed total."""
    outputs = {"dq": new_like(q), "dk": new_like(k), "total_out": new_total(q)}
    totals = {"total": total, "dtotal": dtotal}
    call("linear_backward", {"q": q, "k": k, "dy": dy}, totals, outputs, eps, causal, norm)
    return outputs["dq"], outputs["dk"], outputs["total_out"]


def sum_keys(k: Rows, eps: float, norm: str) -> Total:
    """Sum of exp(norm(k_j)) over all positions."""
    total_out = new_total(k)
    call("linear_pool", {"k": k}, {}, {"total_out": total_out}, eps, True, norm)
    return total_out


def sum_keys_backward(dtotal: Total, k: Rows, eps: float, norm: str) -> Rows:
    """The gradient of `sum_keys` with respect to k."""
    dk = new_like(k)
    call("linear_pool_backward", {"k": k}, {"dtotal": dtotal}, {"dk": dk}, eps, True, norm)
    return dk


def call(
    kernel: str,
    rows: dict[str, Tensor],
    totals: dict[str, Tensor | None],
    outputs: dict[str, Tensor],
    eps: float,
    causal: bool,
    norm: str,
) -> None:
    """Runs a kernel, which takes rows (q, k and dy) that are strided in B and T, and contiguous totals."""
    rows = {name: with_whole_rows(x) for name, x in rows.items()}
    whole_totals = {name: x.contiguous() for name, x in totals.items() if x is not None}
    k = rows["k"]
    strides = {f"{name}_batch_stride": x.stride(0) for name, x in rows.items()}
    strides |= {f"{name}_stride": x.stride(1) for name, x in rows.items()}
    native.call(
        kernel,
        Arguments,
        {**rows, **whole_totals, **outputs},
        **dict(zip(("batch", "length", "heads", "channels"), k.shape, strict=True)),
        **strides,
        eps=eps,
        causal=causal,
        rms=norm == "rms",
        bf16=k.dtype is torch.bfloat16,
        threads=native.threads_for(k.numel(), ELEMENTS_PER_THREAD),
    )


def with_whole_rows(x: Tensor) -> Tensor:
    """x itself where only B and T are strided, else a copy: parts of a sequence need none."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def new_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


def new_total(x: Tensor) -> Tensor:
    return torch.empty((x.shape[0], *x.shape[2:]), dtype=torch.float32)
