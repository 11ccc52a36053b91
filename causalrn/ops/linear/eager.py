"""The linear relation in plain PyTorch, block by block: any device and dtype, O(T D) memory, no autograd graph.

It serves where neither the compiled CPU kernels nor Triton do. Sums run in the dtype of the arithmetic inside a block of
positions and in float64 from block to block, so that a million positions lose no digits.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causalrn.ops import normalisation
from causalrn.ops.dispatch import arithmetic_dtype

Rows = Float[Tensor, "B T H D"]
Total = Float[Tensor, "B H D"]
BLOCK_LENGTH = 256


def forward(q: Rows, k: Rows, total: Total | None, eps: float, causal: bool, norm: str) -> tuple[Rows, Total]:
    """The operator's rows, and the sum after the last of them."""
    dtype = arithmetic_dtype(q)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    carry = first_carry(total, k) if causal else block_starts(k, total, eps, norm)[-1]
    for block in blocks(q.shape[1]):
        sums = carry.to(dtype)[:, None]
        if causal:
            exp_k = normalise(k[:, block], norm, eps)[0].exp()
            sums = sums + exp_k.cumsum(1)
            carry = carry + exp_k.sum(1, dtype=torch.float64)
        value, _ = exp_of_sums(normalise(q[:, block], norm, eps)[0], sums)
        y[:, block] = normalise(value, norm, eps)[0].view(q[:, block].shape)
    return y, carry.to(dtype)


def backward(
    dy: Rows, dtotal: Total | None, q: Rows, k: Rows, total: Total | None, eps: float, causal: bool, norm: str
) -> tuple[Rows, Rows, Total]:
    """The gradients with respect to q, k and the passed total."""
    dtype = arithmetic_dtype(q)
    dq, dk = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    starts = block_starts(k, total, eps, norm)
    # Sum of dl_i / S_i over the positions i from the block's end on, with the gradient of the returned state.
    carry = first_carry(dtotal, k)
    for index, block in reversed(list(enumerate(blocks(q.shape[1])))):
        if not causal:
            sums = starts[-1].to(dtype)[:, None]
            dl, dq[:, block] = rows_backward(dy[:, block], q[:, block], sums, eps, norm)
            carry = carry + (dl / sums).sum(1, dtype=torch.float64)
            continue
        norm_k, spread = normalise(k[:, block], norm, eps)
        exp_k = norm_k.exp()
        sums = starts[index].to(dtype)[:, None] + exp_k.cumsum(1)
        dl, dq[:, block] = rows_backward(dy[:, block], q[:, block], sums, eps, norm)
        ratio = dl / sums
        reverse_sums = carry.to(dtype)[:, None] + ratio.flip(1).cumsum(1).flip(1)
        dk[:, block] = normalisation.eager_backward(exp_k * reverse_sums, norm_k, spread, norm, eps)
        carry = carry + ratio.sum(1, dtype=torch.float64)
    dtotal_in = carry.to(dtype)
    return dq, dk if causal else sum_keys_backward(dtotal_in, k, eps, norm), dtotal_in


def sum_keys(k: Rows, eps: float, norm: str) -> Total:
    """Sum of exp(norm(k_j)) over all positions."""
    return block_starts(k, None, eps, norm)[-1].to(arithmetic_dtype(k))


def sum_keys_backward(dtotal: Total, k: Rows, eps: float, norm: str) -> Rows:
    """The gradient of `sum_keys` with respect to k."""
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    for block in blocks(k.shape[1]):
        norm_k, spread = normalise(k[:, block], norm, eps)
        dk[:, block] = normalisation.eager_backward(norm_k.exp() * dtotal[:, None], norm_k, spread, norm, eps)
    return dk


def blocks(length: int) -> list[slice]:
    return [slice(start, min(start + BLOCK_LENGTH, length)) for start in range(0, length, BLOCK_LENGTH)]


def normalise(
    x: Float[Tensor, "B T *heads D"], norm: str, eps: float
) -> tuple[Float[Tensor, "B T *heads D"], Float[Tensor, "B T *heads"]]:
    """Normalised rows and their deviations in the dtype of the arithmetic."""
    return normalisation.eager(x.to(arithmetic_dtype(x)), norm, eps)


def first_carry(total: Total | None, k: Rows) -> Total:
    """The sum before the first position, in float64."""
    if total is None:
        return k.new_zeros(k.shape[0], *k.shape[2:], dtype=torch.float64)
    return total.to(torch.float64, copy=True)


def block_starts(k: Rows, total: Total | None, eps: float, norm: str) -> list[Total]:
    """The sums before each block, and last the one after all of them, in float64."""
    starts = [first_carry(total, k)]
    for block in blocks(k.shape[1]):
        exp_k = normalise(k[:, block], norm, eps)[0].exp()
        starts.append(starts[-1] + exp_k.sum(1, dtype=torch.float64))
    return starts


def exp_of_sums(
    norm_q: Rows, sums: Float[Tensor, "B S H D"]
) -> tuple[Float[Tensor, "B T HD"], Bool[Tensor, "B T HD"]]:
    """exp(l - max l) of l = norm(q) + log S over all heads and channels, and where the maximum is taken.

    Of the sums there is one per position, or one for all.
    """
    log_y = (norm_q + sums.log()).flatten(2)
    maximum = log_y.amax(-1, keepdim=True)
    return (log_y - maximum).exp(), log_y == maximum


def rows_backward(
    dy: Rows,
    q: Rows,
    sums: Float[Tensor, "B S H D"],
    eps: float,
    norm: str,
) -> tuple[Rows, Rows]:
    """Gradients of the output rows with respect to l and to q."""
    norm_q, spread_q = normalise(q, norm, eps)
    value, at_maximum = exp_of_sums(norm_q, sums)
    y, spread = normalise(value, norm, eps)
    dl = normalisation.eager_backward(dy.to(sums.dtype).flatten(2), y, spread, norm, eps) * value
    # The subtracted maximum moves with l; the post-norm erases that only where eps is 0.
    share = at_maximum / at_maximum.sum(-1, keepdim=True)
    dl = (dl - share * dl.sum(-1, keepdim=True)).view_as(q)
    return dl, normalisation.eager_backward(dl, norm_q, spread_q, norm, eps)
