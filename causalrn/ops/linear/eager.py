"""The linear relation in plain PyTorch, block by block: any device and dtype, O(T D) memory, no autograd graph.

It serves where neither the compiled CPU kernels nor Triton do. Sums run in the compute dtype inside a block of
positions and in float64 from block to block, so that a million positions lose no digits.
"""

import torch
from torch import Tensor

from causalrn.ops.reference import Norm, normalise

BLOCK_LENGTH = 256


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.promote_types(dtype, torch.float32)


def blocks(length: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_LENGTH, length)) for start in range(0, length, BLOCK_LENGTH)]


def exp_norm(k: Tensor, eps: float, norm: Norm) -> Tensor:
    return normalise(k.to(compute_dtype(k.dtype)), norm, eps).exp()


def first_carry(total: Tensor | None, k: Tensor) -> Tensor:
    """The sum before the first position, (B, H, D) in float64."""
    if total is None:
        return k.new_zeros(k.shape[0], *k.shape[2:], dtype=torch.float64)
    return total.to(torch.float64, copy=True)


def block_starts(k: Tensor, total: Tensor | None, eps: float, norm: Norm) -> list[Tensor]:
    """The sums before each block, and last the one after all of them: (B, H, D) in float64 each."""
    carry = first_carry(total, k)
    starts = [carry]
    for block in blocks(k.shape[1]):
        carry = carry + exp_norm(k[:, block], eps, norm).sum(1, dtype=torch.float64)
        starts.append(carry)
    return starts


def scaled_gate(q: Tensor, sums: Tensor, eps: float, norm: Norm) -> tuple[Tensor, Tensor]:
    """exp(l - max l) over all heads and channels, (B, T, H*D), and where the maximum is taken."""
    log_y = (normalise(q, norm, eps) + sums.log()).flatten(2)
    maximum = log_y.amax(-1, keepdim=True)
    return (log_y - maximum).exp(), log_y == maximum


def normalise_backward(grad: Tensor, x: Tensor, norm: Norm, eps: float) -> Tensor:
    """Gradient of `normalise` at x. Where a row's deviation is 0, that of the deviation counts as 0, not as NaN."""
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    std = centred.square().mean(-1, keepdim=True).sqrt()
    inverse = 1 / (std + eps)
    slope = inverse.square() * (grad * centred).mean(-1, keepdim=True) / std
    out = inverse * grad - centred * torch.where(std > 0, slope, 0)
    return out - out.mean(-1, keepdim=True) if norm == "layer" else out


def gate_backward(dy: Tensor, q: Tensor, sums: Tensor, eps: float, norm: Norm) -> tuple[Tensor, Tensor]:
    """Gradients of the output rows with respect to l, (B, T, H, D), and to q."""
    compute = sums.dtype
    q = q.to(compute)
    value, at_maximum = scaled_gate(q, sums, eps, norm)
    dl = normalise_backward(dy.to(compute).flatten(2), value, norm, eps) * value
    # The subtracted maximum moves with l; the post-norm erases that only where eps is 0.
    share = at_maximum / at_maximum.sum(-1, keepdim=True)
    dl = (dl - share * dl.sum(-1, keepdim=True)).view_as(q)
    return dl, normalise_backward(dl, q, norm, eps)


def forward(
    q: Tensor, k: Tensor, total: Tensor | None, eps: float, causal: bool, norm: Norm
) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(q.dtype)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    carry = first_carry(total, k) if causal else block_starts(k, total, eps, norm)[-1]
    for block in blocks(q.shape[1]):
        sums = carry.to(compute)[:, None]
        if causal:
            exp_k = exp_norm(k[:, block], eps, norm)
            sums = sums + exp_k.cumsum(1)
            carry = carry + exp_k.sum(1, dtype=torch.float64)
        value, _ = scaled_gate(q[:, block].to(compute), sums, eps, norm)
        y[:, block] = normalise(value, norm, eps).view(q[:, block].shape)
    return y, carry.to(compute)


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    q: Tensor,
    k: Tensor,
    total: Tensor | None,
    eps: float,
    causal: bool,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = compute_dtype(q.dtype)
    dq, dk = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    starts = block_starts(k, total, eps, norm)
    # Sum of dl_i / S_i over the positions i from the block's end on, with the gradient of the returned state.
    carry = first_carry(dtotal, k)
    for index, block in reversed(list(enumerate(blocks(q.shape[1])))):
        if not causal:
            sums = starts[-1].to(compute)[:, None]
            dl, dq[:, block] = gate_backward(dy[:, block], q[:, block], sums, eps, norm)
            carry = carry + (dl / sums).sum(1, dtype=torch.float64)
            continue
        exp_k = exp_norm(k[:, block], eps, norm)
        sums = starts[index].to(compute)[:, None] + exp_k.cumsum(1)
        dl, dq[:, block] = gate_backward(dy[:, block], q[:, block], sums, eps, norm)
        ratio = dl / sums
        reverse_sums = carry.to(compute)[:, None] + ratio.flip(1).cumsum(1).flip(1)
        dk[:, block] = normalise_backward(exp_k * reverse_sums, k[:, block].to(compute), norm, eps)
        carry = carry + ratio.sum(1, dtype=torch.float64)
    dtotal_in = carry.to(compute)
    return dq, dk if causal else pool_backward(dtotal_in, k, eps, norm), dtotal_in


def pool(k: Tensor, eps: float, norm: Norm) -> Tensor:
    """Sum of exp(norm(k_j)) over all positions, (B, H, D)."""
    return block_starts(k, None, eps, norm)[-1].to(compute_dtype(k.dtype))


def pool_backward(dtotal: Tensor, k: Tensor, eps: float, norm: Norm) -> Tensor:
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    for block in blocks(k.shape[1]):
        part = k[:, block].to(dtotal.dtype)
        dk[:, block] = normalise_backward(exp_norm(part, eps, norm) * dtotal[:, None], part, norm, eps)
    return dk
