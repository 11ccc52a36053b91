"""Calls the compiled CPU kernels of the quadratic relation and of its decoding step."""

import ctypes
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.ops import native
from causalrn.ops.pairs import Activation, Norm, PairRule, PairTerms
from causalrn.ops.quadratic.exponents import exponent_range

Queries = Float[Tensor, "B Tq H D"]
Keys = Float[Tensor, "B Tk H D"]
# Elements (of pairs, of the cache) below which another thread costs more than it saves.
ELEMENTS_PER_THREAD = 2**16
STEP_ELEMENTS_PER_THREAD = 2**15
# Positions that one thread takes at a time. The sums of the parts are added in order: the split decides the rounding.
PART_POSITIONS = 64


class Arguments(ctypes.Structure):
    """`QuadraticArguments` of csrc/quadratic.h."""

    _fields_ = native.fields(
        pointers="q k grad out dq dk gain dgain window slope shift",
        int64="batch queries keys heads channels",
        float32="eps range",
        int32="causal norm activation bf16",
    )


class StepArguments(ctypes.Structure):
    """`StepArguments` of csrc/quadratic_step.cpp."""

    _fields_ = native.fields(
        pointers="q cache lengths out scratch shift gain window slope",
        int64="batch positions heads channels batch_stride position_stride head_stride part",
        float32="eps range",
        int32="norm activation bf16",
    )


def serves(q: Queries) -> bool:
    """Whether the library is there and takes tensors of this dtype."""
    return native.serves(q)


def forward(q: Queries, k: Keys, terms: PairTerms, rule: PairRule, shift: Queries | None = None) -> Queries:
    """The operator's value; fills in the rows of `shift`, zeros, that go beyond the range."""
    q, k = q.contiguous(), k.contiguous()
    out = torch.empty_like(q)
    call("quadratic_forward", q, k, terms, rule, out=out, shift=shift)
    return out


def backward(
    grad: Queries, q: Queries, k: Keys, terms: PairTerms, rule: PairRule, shift: Queries | None = None
) -> tuple[Queries, Keys, Float[Tensor, "Tq H"] | None]:
    """The gradients with respect to q, k and gain (None without a gain), with the shift of the forward pass."""
    grad, q, k = grad.contiguous(), q.contiguous(), k.contiguous()
    shift = None if shift is None else shift.contiguous()
    dq, dk, dgain = torch.empty_like(q), torch.empty_like(k), None
    if terms.gain is not None:
        # One row per batch entry, summed here, so that the sum is the same in every run.
        dgain = terms.gain.new_empty(q.shape[0], q.shape[2], q.shape[1])
    call("quadratic_backward", q, k, terms, rule, grad=grad, dq=dq, dk=dk, dgain=dgain, shift=shift)
    return dq, dk, None if dgain is None else dgain.sum(0).mT.contiguous()


def call(
    kernel: str, q: Tensor, k: Tensor, terms: PairTerms, rule: PairRule, **tensors: Tensor | None
) -> None:
    """Runs a kernel on contiguous tensors; `tensors` are the other ones that it reads and writes."""
    batch, queries, heads, channels = q.shape
    keys = k.shape[1]
    native.call(
        kernel,
        Arguments,
        {"q": q, "k": k, **tensors, **contiguous(terms)},
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        channels=channels,
        **numbers_of(terms, rule),
        causal=rule.causal,
        bf16=q.dtype is torch.bfloat16,
        threads=native.threads_for(batch * queries * keys * heads * channels, ELEMENTS_PER_THREAD),
    )


def serves_step(q: Tensor, cache: Tensor) -> bool:
    """Whether the compiled step is there and takes these tensors."""
    return q.dtype is torch.float32 and native.serves(q) and native.serves(cache) and cache.stride(3) == 1


def step(
    q: Float[Tensor, "B H D"],
    cache: Float[Tensor, "B S H D"],
    lengths: Int[Tensor, " B"],
    terms: PairTerms,
    rule: PairRule,
    shift: Float[Tensor, "B H D"] | None = None,
) -> Float[Tensor, "B H D"]:
    """The value of one decoding step; fills in the rows of `shift`, zeros, that go beyond the range."""
    q, lengths = q.contiguous(), lengths.contiguous()
    batch, positions, heads, channels = cache.shape
    out = torch.empty_like(q)
    parts = -(-positions // PART_POSITIONS)
    scratch = q.new_empty((1 if shift is None else 2) * batch * heads * parts, channels)
    tensors = {"q": q, "cache": cache, "lengths": lengths, "out": out, "scratch": scratch, "shift": shift}
    native.call(
        "quadratic_step",
        StepArguments,
        {**tensors, **contiguous(terms)},
        batch=batch,
        positions=positions,
        heads=heads,
        channels=channels,
        batch_stride=cache.stride(0),
        position_stride=cache.stride(1),
        head_stride=cache.stride(2),
        **numbers_of(terms, rule),
        part=PART_POSITIONS,
        bf16=cache.dtype is torch.bfloat16,
        threads=native.threads_for(cache.numel(), STEP_ELEMENTS_PER_THREAD),
    )
    return out


def contiguous(terms: PairTerms) -> dict[str, Tensor]:
    return {name: x.contiguous() for name, x in terms._asdict().items() if x is not None}


def numbers_of(terms: PairTerms, rule: PairRule) -> dict[str, Any]:
    """The fields that both structures have for the rule. The kernels know norms and activations by their places."""
    return {
        "eps": rule.eps,
        "range": exponent_range(terms.slope),
        "norm": get_args(Norm).index(rule.norm),
        "activation": get_args(Activation).index(rule.activation),
    }
