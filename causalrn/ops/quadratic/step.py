"""One decoding step of the quadratic relation as a PyTorch operator: one query per row against a pool of keys."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.ops.pairs import (
    SCHEMA,
    PairRule,
    PairTerms,
    arithmetic_dtype,
    check_values,
    convert_terms,
    from_schema,
)
from causalrn.ops.quadratic import cpu
from causalrn.ops.quadratic.exponents import beyond_range, plan_shift
from causalrn.ops.reference import ACTIVATIONS, normalise

# Elements (B, positions, H, D) that the PyTorch path forms at a time.
BLOCK_ELEMENTS = 2**20
# All channels of a position have to fit into the registers of a Triton program.
MAX_TRITON_CHANNELS = 8192


def relation_quadratic_step(
    q: Float[Tensor, "B H D"],
    pool: Float[Tensor, "B S H D"],
    lengths: Int[Tensor, " B"],
    terms: PairTerms,
    rule: PairRule,
) -> tuple[Float[Tensor, "B H D"], Float[Tensor, "B H D"] | None]:
    """The last row of `relation_quadratic_shifted`: the mean over the pool's positions j of act(gain_h norm(q_h + k_jh)).

    Row b stands at position lengths[b] - 1, whose own k is in the pool already. It reads the pool once. Not
    differentiable: decoding only.

    Args:
        q: receiving positions, one per row.
        pool: k of all positions so far, in any floating dtype; rows may be longer than their length.
        lengths: number of positions of each row that count, at least 1.
        terms: with one gain per row of q, (B, H).
        rule: what becomes of each pair.

    Returns:
        The mean over the reachable positions in the dtype of q, relative to the shift; and the shift, or None where no
        row needs one: as `relation_quadratic_shifted`.

    Raises:
        ValueError: shapes that do not belong together, an unknown norm or activation, eps < 0, a length outside 1 to S, a
            window < 1 or a slope < 0 (the last three on a CPU only, where a look costs nothing).
    """
    shape = (pool.shape[0], *pool.shape[2:])
    if pool.dim() != 4 or q.shape != shape or lengths.shape != shape[:1]:
        raise ValueError(
            f"relation_quadratic_step: got q {tuple(q.shape)}, pool {tuple(pool.shape)} and lengths "
            f"{tuple(lengths.shape)}, wanted (B, H, D), (B, S, H, D) and (B,)"
        )
    rows = (q.shape[0], q.shape[1])
    terms = convert_terms("relation_quadratic_step", terms, rule, rows, arithmetic_dtype(q))
    terms, shifted = plan_shift(q, pool.shape[1], terms, rule)
    lengths = lengths.to(torch.int64)
    out, shift = torch.ops.causalrn.relation_quadratic_step(q, pool, lengths, *terms, *rule, shifted)
    return out, shift if shifted else None


@torch.library.custom_op(
    "causalrn::relation_quadratic_step",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor pool, Tensor lengths, {SCHEMA}, bool shifted) -> (Tensor out, Tensor shift)",
)
def step_op(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    # On the CPU a look costs nothing, and the kernel would read beyond the pool.
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= pool.shape[1]:
        raise ValueError(
            f"relation_quadratic_step: got lengths {int(lengths.min())} to {int(lengths.max())}, wanted 1 to "
            f"{pool.shape[1]}, the positions of the pool"
        )
    check_values("relation_quadratic_step", PairTerms(*settings[:3]))
    compiled = q.numel() > 0 and cpu.serves_step(q, pool)
    return run(cpu.step if compiled else blocked, q, pool, lengths, *settings)


@step_op.register_kernel("cuda")
def step_op_cuda(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (q.dtype, pool.dtype)
    if q.numel() == 0 or wide or q.shape[2] > MAX_TRITON_CHANNELS or find_spec("triton") is None:
        return run(blocked, q, pool, lengths, *settings)
    # Importing the package must not need Triton.
    from causalrn.ops.quadratic import step_gpu as quadratic_step_triton

    return run(quadratic_step_triton.forward, q, pool, lengths, *settings)


def run(forward: Any, q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """The value and the shift, which is empty unless it is asked for."""
    *flat, shifted = settings
    shift = q.new_zeros(q.shape if shifted else (0,), dtype=arithmetic_dtype(q))
    return forward(q, pool, lengths, *from_schema(*flat), shift if shifted else None), shift


@step_op.register_fake
def step_op_fake(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape if settings[-1] else (0,), dtype=arithmetic_dtype(q))


def blocked(
    q: Tensor,
    pool: Tensor,
    lengths: Tensor,
    terms: PairTerms,
    rule: PairRule,
    shift: Tensor | None = None,
) -> Tensor:
    """The operator in plain PyTorch, a block of positions at a time: any device and dtype.

    Of rows beyond the range, `shift` (zeros) is filled in.
    """
    gain, window, slope = terms
    batch, positions, heads, channels = pool.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    query = q.to(wide)[:, None]
    total = torch.zeros_like(query[:, 0])
    block = max(1, BLOCK_ELEMENTS // max(1, batch * heads * channels))
    count = lengths[:, None] if window is None else torch.minimum(lengths[:, None], window)
    beyond = None
    if shift is not None and gain is not None:
        beyond = beyond_range(gain, count, channels, slope, shift.dtype)[..., None]
        # Below every exponent.
        shift.masked_fill_(beyond, -math.inf)
        beyond = beyond if beyond.any() else None
    for start in range(0, positions, block):
        z = normalise(query + pool[:, start : start + block].to(wide), rule.norm, rule.eps)
        if gain is not None:
            z = z * gain.to(wide)[:, None, :, None]
        # (B, block, 1): how far each position lies before the receiving one.
        distance = lengths[:, None] - 1 - torch.arange(start, start + z.shape[1], device=q.device)
        distance = distance[:, :, None]
        reached = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        if beyond is not None and shift is not None:
            exponents = z if slope is None else z - slope.to(wide)[:, None] * distance[..., None]
            exponents = exponents.masked_fill(~reached[..., None], -math.inf)
            largest = torch.where(beyond, torch.maximum(shift, exponents.amax(1)), shift)
            # Before the first position in reach everything is exp(-inf) = 0.
            base = largest.masked_fill(largest == -math.inf, 0)
            total = total * torch.exp(shift - base) + torch.exp(exponents - base[:, None]).sum(1)
            shift.copy_(largest)
            continue
        pairs = ACTIVATIONS[rule.activation](z).masked_fill(~reached[..., None], 0)
        if slope is not None:
            pairs = pairs * torch.exp(-slope.to(wide) * distance)[..., None]
        total = total + pairs.sum(1)
    return (total / count[..., None]).to(q.dtype)
