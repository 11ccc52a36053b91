"""The quadratic relation in plain PyTorch, tile by tile: any dtype and device, forward and backward in O(T*D) memory.

It serves where neither the compiled CPU kernels nor Triton do, for whole sequences and for decoding steps.
"""

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalrn.ops import normalisation
from causalrn.ops.dispatch import arithmetic_dtype
from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.ops.quadratic.exponents import beyond_range
from causalrn.ops.reference import ACTIVATIONS

Queries = Float[Tensor, "B Tq H D"]
Keys = Float[Tensor, "B Tk H D"]
# Elements (B, H, i, j, D) of one tile: large enough to hide Python's overhead, small enough for the cache.
TILE_ELEMENTS = 2**19


def forward(q: Queries, k: Keys, terms: PairTerms, rule: PairRule, shift: Queries | None = None) -> Queries:
    """The operator's value; fills in the rows of `shift`, zeros, that go beyond the range."""
    gain = None if terms.gain is None else terms.gain[None]
    return sum_pairs(q, k, last_positions(q, k), gain, terms, rule, shift)


def step(
    q: Float[Tensor, "B H D"],
    cache: Float[Tensor, "B S H D"],
    lengths: Int[Tensor, " B"],
    terms: PairTerms,
    rule: PairRule,
    shift: Float[Tensor, "B H D"] | None = None,
) -> Float[Tensor, "B H D"]:
    """The value of one decoding step; fills in the rows of `shift`, zeros, that go beyond the range."""
    gain, shift = (None if x is None else x[:, None] for x in (terms.gain, shift))
    # Positions behind a row's length count as its future.
    rule = rule._replace(causal=True)
    return sum_pairs(q[:, None], cache, lengths[:, None] - 1, gain, terms, rule, shift)[:, 0]


def sum_pairs(
    q: Queries,
    k: Keys,
    positions: Int[Tensor, "#B Tq"],
    gain: Float[Tensor, "#B Tq H"] | None,
    terms: PairTerms,
    rule: PairRule,
    shift: Queries | None,
) -> Queries:
    """The mean over the pairs of queries at these positions with the keys; `gain` takes the place of that in `terms`."""
    wide_q, any_k, wide_gain = heads_first(q), k.transpose(1, 2), gain_of_pairs(gain)
    out = torch.zeros_like(wide_q)
    count = count_keys(positions, k.shape[1], terms.window, rule.causal)
    beyond = rows_beyond(shift, gain, count, terms.slope)
    # A view of what is filled in; rows beyond the range start below every exponent.
    top = None if shift is None else shift.transpose(1, 2)
    if beyond is not None and top is not None:
        top.masked_fill_(beyond[..., None], -math.inf)
    for queries, key_blocks in tiles(wide_q, any_k, rule.causal):
        total, shifted = out[:, :, queries], beyond is not None and beyond[:, :, queries].any()
        for keys in key_blocks:
            # A cache in fewer bits is widened tile by tile.
            x = wide_q[:, :, queries, None] + any_k[:, :, None, keys].to(wide_q.dtype)
            z, _ = normalisation.eager(x, rule.norm, rule.eps)
            z = z if wide_gain is None else z * wide_gain[:, :, queries]
            reached, log_weight = reach(positions[:, queries], keys, terms, rule.causal)
            if shifted and beyond is not None and top is not None:
                exponents = torch.where(reached[..., None], z + log_weight[..., None], -math.inf)
                before = top[:, :, queries]
                largest = torch.maximum(before, exponents.amax(3))
                largest = torch.where(beyond[:, :, queries, None], largest, before)
                # Before the first key in reach everything is exp(-inf) = 0.
                base = largest.masked_fill(largest == -math.inf, 0.0)
                total *= torch.exp(before - base)
                total += torch.exp(exponents - base[:, :, :, None]).sum(3)
                before.copy_(largest)
            else:
                pairs = ACTIVATIONS[rule.activation](z) * log_weight.exp()[..., None]
                # Chosen, not multiplied by 0: an unreachable pair may be infinite.
                total += torch.where(reached[..., None], pairs, 0.0).sum(3)
    return (out / count[..., None]).transpose(1, 2).to(q.dtype).contiguous()


def backward(
    grad: Queries, q: Queries, k: Keys, terms: PairTerms, rule: PairRule, shift: Queries | None = None
) -> tuple[Queries, Keys, Float[Tensor, "Tq H"] | None]:
    """The gradients with respect to q, k and gain (None without a gain), with the shift of the forward pass.

    With w = weight_ij grad_i / n_i act'(gain_i z), z = norm(q_i + k_j): dgain_i = sum_jd w z; dx_ij is the gradient of the
    norm, of which gain_i w is the upstream one; dq_i = sum_j dx_ij, dk_j = sum_i dx_ij.
    """
    wide_q, wide_k, positions = heads_first(q), heads_first(k), last_positions(q, k)
    gain = None if terms.gain is None else terms.gain[None]
    dq, dk = torch.zeros_like(wide_q), torch.zeros_like(wide_k)
    dgain = None if terms.gain is None else torch.zeros_like(terms.gain)
    count = count_keys(positions, k.shape[1], terms.window, rule.causal)
    beyond = rows_beyond(shift, gain, count, terms.slope)
    wide_gain, wide_grad = gain_of_pairs(gain), heads_first(grad) / count[..., None]
    for queries, key_blocks in tiles(wide_q, wide_k, rule.causal):
        shifted = beyond is not None and beyond[:, :, queries].any()
        for keys in key_blocks:
            x = wide_q[:, :, queries, None] + wide_k[:, :, None, keys]
            z, spread = normalisation.eager(x, rule.norm, rule.eps)
            scaled = z if wide_gain is None else z * wide_gain[:, :, queries]
            reached, log_weight = reach(positions[:, queries], keys, terms, rule.causal)
            if shifted and shift is not None:
                w = torch.exp(scaled + log_weight[..., None] - shift.transpose(1, 2)[:, :, queries, None])
            else:
                w = derivative(rule.activation, scaled) * log_weight.exp()[..., None]
            w = torch.where(reached[..., None], w * wide_grad[:, :, queries, None], 0.0)
            if dgain is not None and wide_gain is not None:
                dgain[queries] += (w * z).sum((0, 3, 4)).mT
                w = w * wide_gain[:, :, queries]
            dx = normalisation.eager_backward(w, z, spread, rule.norm, rule.eps)
            dq[:, :, queries] += dx.sum(3)
            dk[:, :, keys] += dx.sum(2)
    narrow_dq, narrow_dk = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (dq, dk))
    return narrow_dq, narrow_dk, dgain


def derivative(activation: str, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """act'(z), elementwise."""
    if activation == "exp":
        return z.exp()
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "elu":
        return torch.where(z > 0, 1.0, z.exp())
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(z) + z * density


def heads_first(x: Float[Tensor, "B T H D"]) -> Float[Tensor, "B H T D"]:
    """x in the dtype of the arithmetic."""
    return x.to(arithmetic_dtype(x)).transpose(1, 2)


def gain_of_pairs(gain: Float[Tensor, "#B T H"] | None) -> Float[Tensor, "#B H T 1 1"] | None:
    return None if gain is None else rearrange(gain, "b t h -> b h t 1 1")


def last_positions(q: Queries, k: Keys) -> Int[Tensor, "1 Tq"]:
    return torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[None]


def tiles(
    q: Float[Tensor, "B H Tq D"], k: Float[Tensor, "B H Tk D"], causal: bool
) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of queries, each with the blocks of keys that any of its queries may reach."""
    (batch, heads, n_queries, channels), n_keys = q.shape, k.shape[2]
    size = max(1, math.isqrt(TILE_ELEMENTS // max(1, batch * heads * channels)))
    # Few queries leave room for many keys.
    width = size * size // min(size, max(1, n_queries))
    for first in range(0, n_queries, size):
        queries = slice(first, min(first + size, n_queries))
        end = queries.stop + n_keys - n_queries if causal else n_keys
        yield queries, [slice(j, min(j + width, end)) for j in range(0, end, width)]


def reach(
    positions: Int[Tensor, "#B i"], keys: slice, terms: PairTerms, causal: bool
) -> tuple[Bool[Tensor, "#B #H i j"], Float[Tensor, "#B #H i j"]]:
    """A mask of the pairs that count, and the logarithm of each weight."""
    j = torch.arange(keys.start, keys.stop, device=positions.device)
    i = rearrange(positions, "b i -> b 1 i 1")
    distance = (i - j).abs()
    reached = j <= i if causal else torch.ones_like(distance, dtype=torch.bool)
    if terms.window is not None:
        reached = reached & (distance < terms.window.view(-1, 1, 1))
    if terms.slope is None:
        return reached, torch.zeros_like(distance, dtype=torch.float32)
    return reached, -terms.slope.view(-1, 1, 1) * distance


def count_keys(
    positions: Int[Tensor, "#B T"], n_keys: int, window: Int[Tensor, " H"] | None, causal: bool
) -> Int[Tensor, "#B #H T"]:
    """Number of keys that each position reaches."""
    positions = positions[:, None]
    span = n_keys if window is None else window.long()[:, None]
    first = (positions - span + 1).clamp(min=0)
    last = positions if causal else (positions + span - 1).clamp(max=n_keys - 1)
    return (last - first + 1).clamp(min=0)


def rows_beyond(
    shift: Float[Tensor, "B T H D"] | None,
    gain: Float[Tensor, "#B T H"] | None,
    count: Int[Tensor, "#B #H T"],
    slope: Float[Tensor, " H"] | None,
) -> Bool[Tensor, "#B H T"] | None:
    """A mask of the shifted rows, or None if no row is."""
    if shift is None or gain is None:
        return None
    beyond = beyond_range(gain, count.mT, shift.shape[3], slope, shift.dtype).mT
    return beyond if beyond.any() else None
