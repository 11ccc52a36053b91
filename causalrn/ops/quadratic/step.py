"""One decoding step of the quadratic relation as a PyTorch operator: one query per row against a cache of keys."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.ops import native
from causalrn.ops.dispatch import arithmetic_dtype, define
from causalrn.ops.pairs import SCHEMA, PairRule, PairTerms, check_values, convert_terms, from_schema
from causalrn.ops.quadratic import cpu, eager
from causalrn.ops.quadratic.exponents import plan_shift
from causalrn.ops.quadratic.operator import forward_fake

# All channels of a position have to fit into the registers of a Triton program.
MAX_TRITON_CHANNELS = 8192


def relation_quadratic_step(
    q: Float[Tensor, "B H D"],
    cache: Float[Tensor, "B S H D"],
    lengths: Int[Tensor, " B"],
    terms: PairTerms,
    rule: PairRule,
) -> tuple[Float[Tensor, "B H D"], Float[Tensor, "B H D"] | None]:
    """The last row of `relation_quadratic_shifted`: the mean over the cache's positions j of act(gain_h norm(q_h + k_jh)).

    Row b stands at position lengths[b] - 1, whose own k is in the cache already. It reads the cache once. Not
    differentiable: decoding only.

    Args:
        q: receiving positions, one per row.
        cache: k of all positions so far, in any floating dtype; rows may be longer than their length.
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
    shape = (cache.shape[0], *cache.shape[2:])
    if cache.dim() != 4 or q.shape != shape or lengths.shape != shape[:1]:
        raise ValueError(
            f"relation_quadratic_step: got q {tuple(q.shape)}, cache {tuple(cache.shape)} and lengths "
            f"{tuple(lengths.shape)}, wanted (B, H, D), (B, S, H, D) and (B,)"
        )
    rows = (q.shape[0], q.shape[1])
    terms = convert_terms("relation_quadratic_step", terms, rule, rows, arithmetic_dtype(q))
    terms, shifted = plan_shift(q, cache.shape[1], terms, rule)
    lengths = lengths.to(torch.int64)
    out, shift = torch.ops.causalrn.relation_quadratic_step(q, cache, lengths, *terms, *rule, shifted)
    return out, shift if shifted else None


def step_on_cpu(q: Tensor, cache: Tensor, lengths: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    # On the CPU a look costs nothing, and the kernel would read beyond the cache.
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= cache.shape[1]:
        raise ValueError(
            f"relation_quadratic_step: got lengths {int(lengths.min())} to {int(lengths.max())}, wanted 1 to "
            f"{cache.shape[1]}, the positions of the cache"
        )
    check_values("relation_quadratic_step", PairTerms(*settings[:3]))
    return run(cpu.step if cpu.serves_step(q, cache) else eager.step, q, cache, lengths, *settings)


def step_on_cuda(q: Tensor, cache: Tensor, lengths: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 in (q.dtype, cache.dtype)
    if q.numel() == 0 or wide or q.shape[2] > MAX_TRITON_CHANNELS or not native.has_triton():
        return run(eager.step, q, cache, lengths, *settings)
    # Importing the package must not need Triton.
    from causalrn.ops.quadratic import step_gpu

    return run(step_gpu.step, q, cache, lengths, *settings)


def run(
    step: Callable[..., Tensor], q: Tensor, cache: Tensor, lengths: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    """The value and the shift, which is empty unless it is asked for."""
    *flat, shifted = settings
    shift = q.new_zeros(q.shape if shifted else (0,), dtype=arithmetic_dtype(q))
    return step(q, cache, lengths, *from_schema(*flat), shift if shifted else None), shift


step_op = define(
    "relation_quadratic_step",
    f"(Tensor q, Tensor cache, Tensor lengths, {SCHEMA}, bool shifted) -> (Tensor out, Tensor shift)",
    cpu=step_on_cpu,
    cuda=step_on_cuda,
    fake=lambda q, cache, lengths, *settings: forward_fake(q, cache, *settings),
)
