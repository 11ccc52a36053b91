"""The quadratic relation in plain PyTorch, tile by tile: any dtype and device, forward and backward in O(T*D) memory."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.ops.quadratic.exponents import beyond_range
from causalrn.ops.reference import ACTIVATIONS

# Elements (B, H, i, j, D) of one tile: large enough to hide Python's overhead, small enough for the cache.
TILE_ELEMENTS = 2**19


def derivative(activation: str, z: Tensor) -> Tensor:
    """act'(z), elementwise."""
    if activation == "exp":
        return z.exp()
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "elu":
        return torch.where(z > 0, 1.0, z.exp())
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(z) + z * density


def widen(x: Tensor) -> Tensor:
    """(B, T, H, D) in any dtype as (B, H, T, D) in the dtype of the arithmetic: float64, else float32."""
    return x.to(torch.float64 if x.dtype is torch.float64 else torch.float32).transpose(1, 2)


def reach(
    positions: Tensor, keys: Tensor, causal: bool, window: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Whether each pair counts, and its weight: (#H, i, j) each."""
    distance = (positions[:, None] - keys).abs()[None]
    reached = (keys <= positions[:, None])[None] if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        reached = reached & (distance < window.view(-1, 1, 1))
    weight = reached if slope is None else reached * torch.exp(-slope.view(-1, 1, 1) * distance)
    return reached, weight


def log_weight(positions: Tensor, keys: Tensor, slope: Tensor | None) -> Tensor | float:
    """Logarithm of the weights of `reach`, (H, i, j, 1), where they are not 0 for being out of reach."""
    distance = (positions[:, None] - keys).abs()[None, :, :, None]
    return 0.0 if slope is None else -slope.view(-1, 1, 1, 1) * distance


def shifted_rows(
    shift: Tensor | None, gain: Tensor | None, count: Tensor, slope: Tensor | None
) -> Tensor | None:
    """Which rows (H, i) of these queries, which have `count` pairs, are shifted, or None if none is."""
    if shift is None or gain is None:
        return None
    channels = shift.shape[3]
    beyond = beyond_range(gain, count.mT, channels, slope, gain.dtype).mT
    return beyond if beyond.any() else None


def tiles(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of queries (B, H, i, D), each with the blocks of keys that any of its queries may reach."""
    (batch, heads, n_queries, channels), n_keys = q.shape, k.shape[2]
    size = max(1, math.isqrt(TILE_ELEMENTS // max(1, batch * heads * channels)))
    for first in range(0, n_queries, size):
        queries = slice(first, min(first + size, n_queries))
        end = queries.stop + n_keys - n_queries if causal else n_keys
        yield queries, [slice(j, min(j + size, end)) for j in range(0, end, size)]


def normalise_pairs(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centred x (for "layer"), 1 / (std + eps) and std of each pair; the latter two (..., 1)."""
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    if norm == "none":
        return x, torch.ones_like(x[..., :1]), torch.zeros_like(x[..., :1])
    std = x.square().mean(-1, keepdim=True).sqrt()
    return x, 1 / (std + eps), std


def forward(
    q: Tensor,
    k: Tensor,
    terms: PairTerms,
    rule: PairRule,
    shift: Tensor | None = None,
) -> Tensor:
    """The operator's value; arguments as `relation_quadratic_shifted`. Of rows beyond the range, `shift` (zeros) is filled in."""
    gain, window, slope = terms
    eps, causal, norm, activation = rule
    wide_q, wide_k = widen(q), widen(k)
    out = torch.zeros_like(wide_q)
    positions = torch.arange(k.shape[1], device=q.device)
    query_positions = positions[k.shape[1] - q.shape[1] :]
    for queries, key_blocks in tiles(wide_q, wide_k, causal):
        masks = [
            reach(query_positions[queries], positions[keys], causal, window, slope) for keys in key_blocks
        ]
        count = torch.stack([reached.sum(-1) for reached, _ in masks]).sum(0)
        beyond = shifted_rows(shift, None if gain is None else gain[queries], count, slope)
        # A view of what is returned; rows beyond the range start below every exponent.
        top = None if shift is None else shift.transpose(1, 2)[:, :, queries]
        if beyond is not None and top is not None:
            top.masked_fill_(beyond[..., None], -math.inf)
        for keys, (reached, weight) in zip(key_blocks, masks, strict=True):
            x, inverse, _ = normalise_pairs(wide_q[:, :, queries, None] + wide_k[:, :, None, keys], norm, eps)
            if gain is not None:
                inverse = inverse * gain[queries].mT[:, :, None, None]
            if beyond is not None and top is not None:
                exponents = x * inverse + log_weight(query_positions[queries], positions[keys], slope)
                exponents = torch.where(reached[..., None], exponents, -math.inf)
                largest = torch.where(beyond[..., None], torch.maximum(top, exponents.amax(3)), top)
                # Before the first key in reach everything is exp(-inf) = 0.
                base = largest.masked_fill(largest == -math.inf, 0.0)
                out[:, :, queries] *= torch.exp(top - base)
                out[:, :, queries] += torch.exp(exponents - base[:, :, :, None]).sum(3)
                top.copy_(largest)
                continue
            pairs = ACTIVATIONS[activation](x * inverse) * weight[..., None]
            # Chosen, not multiplied by 0: an unreachable pair may be infinite.
            out[:, :, queries] += torch.where(reached[..., None], pairs, 0.0).sum(3)
        out[:, :, queries] /= count[..., None]
    return out.transpose(1, 2).to(q.dtype).contiguous()


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    terms: PairTerms,
    rule: PairRule,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients with respect to q, k and gain (None without a gain), with the shift of the forward pass.

    With w = weight_ij grad_i / n_i act'(gain_i z), z = r x, r = 1 / (std + eps) and means over the channels:
    dx_ij = gain_i r (w - mean(w) - x mean(w z) / std), the mean of w only for "layer"; dq_i = sum_j dx_ij,
    dk_j = sum_i dx_ij, dgain_i = sum_jd w z.
    """
    gain, window, slope = terms
    eps, causal, norm, activation = rule
    wide_q, wide_k, wide_grad = widen(q), widen(k), widen(grad)
    dq, dk = torch.zeros_like(wide_q), torch.zeros_like(wide_k)
    dgain = None if gain is None else torch.zeros_like(gain)
    positions = torch.arange(k.shape[1], device=q.device)
    query_positions = positions[k.shape[1] - q.shape[1] :]
    for queries, key_blocks in tiles(wide_q, wide_k, causal):
        masks = [
            reach(query_positions[queries], positions[keys], causal, window, slope) for keys in key_blocks
        ]
        count = torch.stack([reached.sum(-1) for reached, _ in masks]).sum(0)
        beyond = shifted_rows(shift, None if gain is None else gain[queries], count, slope)
        upstream = (wide_grad[:, :, queries] / count[..., None])[:, :, :, None]
        for keys, (reached, weight) in zip(key_blocks, masks, strict=True):
            x, inverse, std = normalise_pairs(
                wide_q[:, :, queries, None] + wide_k[:, :, None, keys], norm, eps
            )
            z = x * inverse
            rows = None if gain is None else gain[queries].mT[:, :, None, None]
            if beyond is None or rows is None or shift is None:
                w = upstream * derivative(activation, z if rows is None else z * rows) * weight[..., None]
            else:
                exponents = z * rows + log_weight(query_positions[queries], positions[keys], slope)
                w = upstream * torch.exp(exponents - shift.transpose(1, 2)[:, :, queries, None])
            w = torch.where(reached[..., None], w, 0.0)
            along = (w * z).sum(-1, keepdim=True)
            if dgain is not None:
                dgain[queries] += along.sum((0, 3, 4)).mT
            dx = w
            if norm == "layer":
                dx = dx - w.mean(-1, keepdim=True)
            if norm != "none":
                # Where x = 0 the norm is x / eps, without a second term.
                dx = dx - x * torch.where(std > 0, along / (std * x.shape[-1]), 0.0)
            dx = dx * (inverse if rows is None else inverse * rows)
            dq[:, :, queries] += dx.sum(3)
            dk[:, :, keys] += dx.sum(2)
    narrow_dq, narrow_dk = (x.transpose(1, 2).to(q.dtype).contiguous() for x in (dq, dk))
    return narrow_dq, narrow_dk, dgain
