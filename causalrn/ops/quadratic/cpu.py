"""Calls the compiled CPU kernels of the quadratic relation."""

import ctypes
from typing import get_args

import torch
from torch import Tensor

from causalrn.ops import native
from causalrn.ops.pairs import Activation, Norm, PairRule, PairTerms
from causalrn.ops.quadratic.exponents import exponent_range

DTYPES = (torch.float32, torch.bfloat16)
# Pair elements below which starting another thread costs more than it saves.
ELEMENTS_PER_THREAD = 2**16


class Arguments(ctypes.Structure):
    """`QuadraticArguments` of csrc/quadratic.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "grad", "out", "dq", "dk")),
        *((name, ctypes.c_void_p) for name in ("gain", "dgain", "window", "slope", "shift")),
        *((name, ctypes.c_int64) for name in ("batch", "queries", "keys", "heads", "channels")),
        *((name, ctypes.c_float) for name in ("eps", "range")),
        *((name, ctypes.c_int32) for name in ("causal", "norm", "activation", "bf16", "threads")),
    )


def available(q: Tensor) -> bool:
    """Whether the library is there and serves tensors of this dtype."""
    return q.dtype in DTYPES and native.load_library() is not None


def run(
    kernel: str, q: Tensor, k: Tensor, terms: PairTerms, rule: PairRule, **tensors: Tensor | None
) -> None:
    """Runs a kernel on contiguous tensors; `tensors` are the other ones it reads and writes, or None."""
    tensors |= {name: contiguous(x) for name, x in terms._asdict().items()}
    batch, queries, heads, channels = q.shape
    keys = k.shape[1]
    elements = batch * queries * keys * heads * channels
    arguments = Arguments(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        channels=channels,
        eps=rule.eps,
        range=exponent_range(terms.slope),
        causal=rule.causal,
        norm=get_args(Norm).index(rule.norm),
        activation=get_args(Activation).index(rule.activation),
        bf16=q.dtype is torch.bfloat16,
        threads=min(torch.get_num_threads(), 1 + elements // ELEMENTS_PER_THREAD),
        **{name: x.data_ptr() for name, x in {"q": q, "k": k, **tensors}.items() if x is not None},
    )
    function = native.find_kernel(kernel, Arguments)
    assert function is not None
    if function(ctypes.byref(arguments)) != 0:
        raise MemoryError(
            f"{kernel}: no memory left for the scratch copies of q {tuple(q.shape)} and k {tuple(k.shape)}"
        )


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    terms: PairTerms,
    rule: PairRule,
    shift: Tensor | None = None,
) -> Tensor:
    """The operator's value; arguments as `relation_quadratic_shifted`. Of rows beyond the range, `shift` (zeros) is filled in."""
    q, k = q.contiguous(), k.contiguous()
    out = torch.empty_like(q)
    run("quadratic_forward", q, k, terms, rule, out=out, shift=shift)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    terms: PairTerms,
    rule: PairRule,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients with respect to q, k and gain (None without a gain), with the shift of the forward pass."""
    grad, q, k = grad.contiguous(), q.contiguous(), k.contiguous()
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    # One row per batch entry, summed here, so that the sum is the same in every run.
    gain = terms.gain
    dgain = None if gain is None else gain.new_empty(q.shape[0], q.shape[2], q.shape[1])
    run(
        *("quadratic_backward", q, k, terms, rule),
        grad=grad,
        dq=dq,
        dk=dk,
        dgain=dgain,
        shift=contiguous(shift),
    )
    return dq, dk, None if dgain is None else dgain.sum(0).mT.contiguous()
