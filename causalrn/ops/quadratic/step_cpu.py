"""Calls the compiled CPU kernel of the quadratic relation's decoding step."""

import ctypes
from typing import get_args

import torch
from torch import Tensor

from causalrn.ops import native
from causalrn.ops.pairs import Activation, Norm, PairRule, PairTerms
from causalrn.ops.quadratic.exponents import exponent_range

POOL_DTYPES = (torch.float32, torch.bfloat16)
# Positions that one thread takes at a time. The sums of the parts are added in order: the split decides the rounding.
PART_POSITIONS = 64
# Pool elements below which another thread costs more than it saves.
ELEMENTS_PER_THREAD = 2**15


class Arguments(ctypes.Structure):
    """`StepArguments` of csrc/quadratic_step.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "pool", "lengths", "out", "scratch", "shift")),
        *((name, ctypes.c_void_p) for name in ("gain", "window", "slope")),
        *((name, ctypes.c_int64) for name in ("batch", "positions", "heads", "channels")),
        *((f"{axis}_stride", ctypes.c_int64) for axis in ("batch", "position", "head")),
        ("part", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("eps", "range")),
        *((name, ctypes.c_int32) for name in ("norm", "activation", "bf16", "threads")),
    )


def available(q: Tensor, pool: Tensor) -> bool:
    """Whether the library is there and serves these tensors."""
    return (
        q.dtype is torch.float32
        and pool.dtype in POOL_DTYPES
        and pool.stride(3) == 1
        and native.load_library() is not None
    )


def forward(
    q: Tensor,
    pool: Tensor,
    lengths: Tensor,
    terms: PairTerms,
    rule: PairRule,
    shift: Tensor | None = None,
) -> Tensor:
    """The operator's value; arguments as `relation_quadratic_step`. Of rows beyond the range, `shift` is filled in."""
    q = q.contiguous()
    batch, positions, heads, channels = pool.shape
    out = torch.empty_like(q)
    parts = -(-positions // PART_POSITIONS)
    scratch = q.new_empty((1 if shift is None else 2) * batch * heads * parts, channels)
    tensors = {
        "q": q,
        "pool": pool,
        "lengths": lengths.contiguous(),
        "out": out,
        "scratch": scratch,
        **{name: x.contiguous() for name, x in {**terms._asdict(), "shift": shift}.items() if x is not None},
    }
    arguments = Arguments(
        batch=batch,
        positions=positions,
        heads=heads,
        channels=channels,
        batch_stride=pool.stride(0),
        position_stride=pool.stride(1),
        head_stride=pool.stride(2),
        part=PART_POSITIONS,
        eps=rule.eps,
        range=exponent_range(terms.slope),
        norm=get_args(Norm).index(rule.norm),
        activation=get_args(Activation).index(rule.activation),
        bf16=pool.dtype is torch.bfloat16,
        threads=min(torch.get_num_threads(), 1 + batch * positions * heads * channels // ELEMENTS_PER_THREAD),
        **{name: x.data_ptr() for name, x in tensors.items()},
    )
    function = native.find_kernel("quadratic_step", Arguments)
    assert function is not None
    function(ctypes.byref(arguments))
    return out
