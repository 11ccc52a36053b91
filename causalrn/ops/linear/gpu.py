"""The linear relation on a GPU: fused Triton kernels around a blocked scan over the positions.

The positions are cut into blocks. A first kernel sums exp(norm(k)) over each block, a second one scans those sums,
and the main one walks down the rows of its block with the running sum in registers, so that normalising, gating and
the norm over all channels need nothing from memory but q and k. The backward mirrors that with a reverse scan.
A row takes about 30 instructions per channel: besides bytes, it is instructions that have to be saved. Hence no
logarithms (a product of exponentials divided by its sum instead of exp(l - max l)), as few warps per row as hold it
in registers (sums over a row are shuffles), statistics of k kept, and rows in chunks with little padding.
"""

# Triton's compile-time parameters are in capitals and typed by what they become; its tuples grow by concatenation.
# ruff: noqa: N803, N806, RUF005
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

# A pass over k alone: plain PyTorch that reads it block by block serves well enough.
from causalrn.ops.linear.eager import sum_keys, sum_keys_backward  # noqa: F401
from causalrn.ops.linear.gpu_rows import (
    add,
    dot,
    exp_norm,
    load_heads,
    load_row,
    maximum,
    multiply,
    pull,
    scale,
    standardise,
    standardise_backward,
    store_row,
    subtract,
    total,
    zeros_row,
)
from causalrn.ops.triton_common import ceil_div, on_device_of

# Up to this many channels exp(norm(q)) * sum(exp(norm(k))) fits float32 for any input and 2^24 positions:
# the logarithms to base 2 reach 46 + 46 + 24 < 127. Wider rows subtract their maximum first.
WIDEST_UNSHIFTED = 1024
# Values per thread and row: four to six such rows are alive at once.
ROW_REGISTERS = 32
# Vectors per row, which the kernels unroll.
MAX_CHUNKS = 32
# Warps that keep a multiprocessor busy. Blocks are as long as that allows: each costs a float32 row per pass.
WARPS_PER_MULTIPROCESSOR = 16
SHORTEST_BLOCK, LONGEST_BLOCK = 16, 256


@triton.jit(do_not_specialize=["length", "block_length"])
def _sums_kernel(
    k, sums, stats, eps, length, block_length, channels, stride_batch, stride_time, stride_head,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Sums of exp(norm(k)) over each block, (B, n_blocks, H, D), and means and deviations of k, (B, T, 2, H)."""
    start = tl.program_id(0) * block_length
    batch = tl.program_id(1).to(tl.int64)
    k_row = k + batch * stride_batch + start.to(tl.int64) * stride_time
    stats_row = stats + (batch * length + start) * (2 * HEADS)
    running = zeros_row(HEADS * CHUNKS, WIDTH)
    for _row in range(start, tl.minimum(start + block_length, length)):
        x = load_row(k_row, stride_head, channels, HEADS, CHUNKS, WIDTH)
        _, means, stds = standardise(x, channels, HEADS, CHUNKS, WIDTH, MASKED, CENTRED)
        for head in tl.static_range(HEADS):
            tl.store(stats_row + head, means[head])
            tl.store(stats_row + HEADS + head, stds[head])
        exp_k = exp_norm(x, means, stds, channels, eps, HEADS, CHUNKS, WIDTH, MASKED, False)
        running = add(running, exp_k, HEADS * CHUNKS)
        k_row += stride_time
        stats_row += 2 * HEADS
    row = sums + (batch * tl.num_programs(0) + tl.program_id(0)) * (HEADS * channels)
    store_row(row, running, channels, channels, HEADS, CHUNKS, WIDTH)


@triton.jit(do_not_specialize=["n_blocks"])
def _scan_kernel(
    sums, first, starts, n_blocks, columns,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """starts[p] = first + the first p rows (the last p, if REVERSE) of sums: (B, n_blocks + 1, columns).

    The running sum is a sum of two float32 (two-sum of Knuth), so that its length costs no digits.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(1).to(tl.int64)
    inside = (column < columns)[None, :]
    high = tl.zeros((COLUMNS,), tl.float32)
    if HAS_FIRST:
        high = tl.load(first + batch * columns + column, mask=column < columns, other=0.0)
    low = tl.zeros((COLUMNS,), tl.float32)
    sums += batch * n_blocks * columns + column[None, :]
    starts += batch * (n_blocks + 1) * columns + column[None, :]
    for position in range(0, n_blocks + 1, ROWS):
        row = position + tl.arange(0, ROWS)[:, None]
        # Row p adds block p - 1: shifting the rows makes the sums exclusive without a subtraction, which would cancel.
        block = n_blocks - row if REVERSE else row - 1
        values = tl.load(
            sums + block.to(tl.int64) * columns, mask=(row > 0) & (row <= n_blocks) & inside, other=0.0
        )
        result = high[None, :] + (low[None, :] + tl.cumsum(values, 0))
        tl.store(starts + row.to(tl.int64) * columns, result, mask=(row <= n_blocks) & inside)
        added = tl.sum(values, 0)
        sum_ = high + added
        seen = sum_ - high
        low += (high - (sum_ - seen)) + (added - seen)
        high = sum_


@triton.jit
def _gated(
    q_row, stride_head, channels, eps, sums,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, CENTRED: tl.constexpr,
    SHIFTED: tl.constexpr, HAS_EPS: tl.constexpr,
):  # fmt: skip
    """One row before its last norm, v = exp(l) / sum(exp(l)) over all heads and channels.

    Gives q centred, its deviations, v / sums, v, v centred, its deviation, and the eps to add to that: eps is
    relative to rows with a maximum of 1.
    """
    N: tl.constexpr = HEADS * CHUNKS
    x = load_row(q_row, stride_head, channels, HEADS, CHUNKS, WIDTH)
    centred, _, stds = standardise(x, channels, HEADS, CHUNKS, WIDTH, MASKED, CENTRED)
    zeros = ()
    for _ in tl.static_range(HEADS):
        zeros = zeros + (0.0,)
    gate = exp_norm(centred, zeros, stds, channels, eps, HEADS, CHUNKS, WIDTH, MASKED, SHIFTED)
    value = multiply(gate, sums, N)
    inverse = 1.0 / total(value, 0, N)
    v = scale(value, inverse, N)
    spread = v
    if CENTRED:
        means = ()
        for _ in tl.static_range(HEADS):
            means = means + (1.0 / (HEADS * channels),)
        spread = subtract(v, means, channels, HEADS, CHUNKS, WIDTH, MASKED)
    std = tl.sqrt(dot(spread, spread, 0, N) / (HEADS * channels))
    last_eps = eps * maximum(v, N) if HAS_EPS else 0.0
    return centred, stds, scale(gate, inverse, N), v, spread, std, last_eps


@triton.jit(do_not_specialize=["length", "block_length", "n_blocks"])
def _forward_kernel(
    q, k, stats, starts, y, eps, length, block_length, n_blocks, channels,
    q_stride_batch, q_stride_time, q_stride_head, k_stride_batch, k_stride_time, k_stride_head,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, CENTRED: tl.constexpr,
    SHIFTED: tl.constexpr, CAUSAL: tl.constexpr, HAS_EPS: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = HEADS * CHUNKS
    # The last blocks of k were read last by the sums, and may still be in the cache.
    block = n_blocks - 1 - tl.program_id(0)
    start = block * block_length
    batch = tl.program_id(1).to(tl.int64)
    carried = block if CAUSAL else n_blocks
    row = starts + (batch * (n_blocks + 1) + carried) * (HEADS * channels)
    sums = load_row(row, channels, channels, HEADS, CHUNKS, WIDTH)
    q_row = q + batch * q_stride_batch + start.to(tl.int64) * q_stride_time
    k_row = k + batch * k_stride_batch + start.to(tl.int64) * k_stride_time
    stats_row = stats + (batch * length + start) * (2 * HEADS)
    y_row = y + (batch * length + start) * (HEADS * channels)
    for _row in range(start, tl.minimum(start + block_length, length)):
        if CAUSAL:
            x = load_row(k_row, k_stride_head, channels, HEADS, CHUNKS, WIDTH)
            means = load_heads(stats_row, HEADS)
            stds = load_heads(stats_row + HEADS, HEADS)
            exp_k = exp_norm(x, means, stds, channels, eps, HEADS, CHUNKS, WIDTH, MASKED, False)
            sums = add(sums, exp_k, N)
        _, _, _, _, spread, std, last_eps = _gated(
            q_row, q_stride_head, channels, eps, sums, HEADS, CHUNKS, WIDTH, MASKED, CENTRED, SHIFTED, HAS_EPS
        )
        out = scale(spread, 1.0 / (std + last_eps), N)
        store_row(y_row, out, channels, channels, HEADS, CHUNKS, WIDTH)
        q_row += q_stride_time
        k_row += k_stride_time
        stats_row += 2 * HEADS
        y_row += HEADS * channels


@triton.jit(do_not_specialize=["length", "block_length", "n_blocks"])
def _backward_q_kernel(
    dy, q, k, stats, starts, dq, ratios, ratio_sums, eps, length, block_length, n_blocks, channels,
    dy_stride_batch, dy_stride_time, dy_stride_head, q_stride_batch, q_stride_time, q_stride_head,
    k_stride_batch, k_stride_time, k_stride_head,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, CENTRED: tl.constexpr,
    SHIFTED: tl.constexpr, CAUSAL: tl.constexpr, HAS_EPS: tl.constexpr,
):  # fmt: skip
    """dq, the rows dl / S (into `ratios`, if CAUSAL) and their sums over each block."""
    N: tl.constexpr = HEADS * CHUNKS
    block = n_blocks - 1 - tl.program_id(0)
    start = block * block_length
    batch = tl.program_id(1).to(tl.int64)
    carried = block if CAUSAL else n_blocks
    row = starts + (batch * (n_blocks + 1) + carried) * (HEADS * channels)
    sums = load_row(row, channels, channels, HEADS, CHUNKS, WIDTH)
    dy_row = dy + batch * dy_stride_batch + start.to(tl.int64) * dy_stride_time
    q_row = q + batch * q_stride_batch + start.to(tl.int64) * q_stride_time
    k_row = k + batch * k_stride_batch + start.to(tl.int64) * k_stride_time
    stats_row = stats + (batch * length + start) * (2 * HEADS)
    out_at = (batch * length + start) * (HEADS * channels)
    running = zeros_row(N, WIDTH)
    for _row in range(start, tl.minimum(start + block_length, length)):
        if CAUSAL:
            x = load_row(k_row, k_stride_head, channels, HEADS, CHUNKS, WIDTH)
            means = load_heads(stats_row, HEADS)
            k_stds = load_heads(stats_row + HEADS, HEADS)
            exp_k = exp_norm(x, means, k_stds, channels, eps, HEADS, CHUNKS, WIDTH, MASKED, False)
            sums = add(sums, exp_k, N)
        centred, stds, gate, v, spread, std, last_eps = _gated(
            q_row, q_stride_head, channels, eps, sums, HEADS, CHUNKS, WIDTH, MASKED, CENTRED, SHIFTED, HAS_EPS
        )
        grad = load_row(dy_row, dy_stride_head, channels, HEADS, CHUNKS, WIDTH)
        factor = 1.0 / (std + last_eps)
        mean = total(grad, 0, N) / (HEADS * channels) if CENTRED else 0.0
        taken = pull(dot(grad, spread, 0, N), std, factor, HEADS * channels)
        dv = ()
        for n in tl.static_range(N):
            dv = dv + ((grad[n] - mean) * factor - spread[n] * taken,)
        if HAS_EPS:
            # The maximum of 1 moves with l, which the last norm erases only where eps is 0. Ties share it.
            peak = maximum(v, N)
            peaks = ()
            for n in tl.static_range(N):
                peaks = peaks + (tl.where(v[n] == peak, 1.0, 0.0),)
            share = dot(dv, v, 0, N) / (total(peaks, 0, N) * peak)
            dv = add(dv, scale(peaks, -share, N), N)
        # dl / S without the division: v / S is the gate.
        ratio = multiply(dv, gate, N)
        running = add(running, ratio, N)
        dx = standardise_backward(
            multiply(dv, v, N), centred, stds, channels, eps, HEADS, CHUNKS, WIDTH, MASKED, CENTRED
        )
        store_row(dq + out_at, dx, channels, channels, HEADS, CHUNKS, WIDTH)
        if CAUSAL:
            store_row(ratios + out_at, ratio, channels, channels, HEADS, CHUNKS, WIDTH)
        dy_row += dy_stride_time
        q_row += q_stride_time
        k_row += k_stride_time
        stats_row += 2 * HEADS
        out_at += HEADS * channels
    row = ratio_sums + (batch * n_blocks + block) * (HEADS * channels)
    store_row(row, running, channels, channels, HEADS, CHUNKS, WIDTH)


@triton.jit(do_not_specialize=["length", "block_length", "n_blocks"])
def _backward_k_kernel(
    k, stats, starts, dk, eps, length, block_length, n_blocks, channels, k_stride_batch, k_stride_time, k_stride_head,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, CENTRED: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk from the reverse sums of dl / S; if CAUSAL, dk holds the rows dl / S before."""
    N: tl.constexpr = HEADS * CHUNKS
    block = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    end = tl.minimum((block + 1) * block_length, length)
    carried = n_blocks - 1 - block if CAUSAL else n_blocks
    row = starts + (batch * (n_blocks + 1) + carried) * (HEADS * channels)
    sums = load_row(row, channels, channels, HEADS, CHUNKS, WIDTH)
    k_row = k + batch * k_stride_batch + (end - 1).to(tl.int64) * k_stride_time
    stats_row = stats + (batch * length + end - 1) * (2 * HEADS)
    dk_row = dk + (batch * length + end - 1) * (HEADS * channels)
    for _row in range(block * block_length, end):
        if CAUSAL:
            sums = add(sums, load_row(dk_row, channels, channels, HEADS, CHUNKS, WIDTH), N)
        x = load_row(k_row, k_stride_head, channels, HEADS, CHUNKS, WIDTH)
        means = load_heads(stats_row, HEADS)
        stds = load_heads(stats_row + HEADS, HEADS)
        centred = subtract(x, means, channels, HEADS, CHUNKS, WIDTH, MASKED) if CENTRED else x
        exp_k = exp_norm(x, means, stds, channels, eps, HEADS, CHUNKS, WIDTH, MASKED, False)
        dx = standardise_backward(
            multiply(exp_k, sums, N), centred, stds, channels, eps, HEADS, CHUNKS, WIDTH, MASKED, CENTRED
        )
        store_row(dk_row, dx, channels, channels, HEADS, CHUNKS, WIDTH)
        k_row -= k_stride_time
        stats_row -= 2 * HEADS
        dk_row -= HEADS * channels


def row_geometry(heads: int, channels: int) -> tuple[int, int, int]:
    """Warps per row, chunks per head and their width: the least padding, then the fewest chunks."""
    warps = 1
    while warps < 16 and heads * channels > 32 * warps * ROW_REGISTERS:
        warps *= 2
    widths = [warps * 32 * values for values in (1, 2, 4, 8, 16, 32)]
    fitting = [width for width in widths if heads * ceil_div(channels, width) <= max(MAX_CHUNKS, heads)]
    width = min(fitting, key=lambda width: (ceil_div(channels, width) * width, -width))
    return warps, ceil_div(channels, width), width


def block_length(q: Tensor, warps: int) -> int:
    """Positions per block, a power of two."""
    if q.device.type != "cuda":
        return SHORTEST_BLOCK
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    rows = q.shape[0] * q.shape[1] * warps / (multiprocessors * WARPS_PER_MULTIPROCESSOR)
    return min(max(1 << int(rows).bit_length(), SHORTEST_BLOCK), LONGEST_BLOCK)


def _scan(sums: Tensor, first: Tensor | None, reverse: bool) -> Tensor:
    """Exclusive sums of the blocks' sums (B, n_blocks, H, D) along them, and last the sum of all, plus `first`."""
    batch, n_blocks, heads, channels = sums.shape
    starts = torch.empty((batch, n_blocks + 1, heads, channels), dtype=torch.float32, device=sums.device)
    columns = 32
    _scan_kernel[(ceil_div(heads * channels, columns), batch)](
        sums, first, starts, n_blocks, heads * channels, REVERSE=reverse, HAS_FIRST=first is not None,
        ROWS=128, COLUMNS=columns,
    )  # fmt: skip
    return starts


class _Plan:
    """The blocks that the rows of q and k are cut into, and the sums of exp(norm(k)) before each block and after the last."""

    def __init__(self, q: Tensor, k: Tensor, total: Tensor | None, eps: float, norm: str) -> None:
        batch, length, heads, channels = q.shape
        warps, chunks, width = row_geometry(heads, channels)
        self.block_length = block_length(q, warps)
        self.n_blocks = ceil_div(length, self.block_length)
        self.grid = (self.n_blocks, batch)
        self.meta = {
            "HEADS": heads, "CHUNKS": chunks, "WIDTH": width, "MASKED": chunks * width != channels,
            "CENTRED": norm == "layer", "num_warps": warps,
        }  # fmt: skip
        sums = torch.empty((batch, self.n_blocks, heads, channels), dtype=torch.float32, device=q.device)
        # Means and deviations of k's heads.
        self.stats = torch.empty((batch, length, 2, heads), dtype=torch.float32, device=q.device)
        _sums_kernel[self.grid](
            k, sums, self.stats, eps, length, self.block_length, channels, *k.stride()[:3], **self.meta
        )
        self.starts = _scan(sums, None if total is None else total.contiguous(), reverse=False)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, total: Tensor | None, eps: float, causal: bool, norm: str
) -> tuple[Tensor, Tensor]:
    """`reference.relation_linear_reference` on q and k (B, T, H, D) of one dtype: y, and the sum after the last row."""
    q, k = _unit_stride(q), _unit_stride(k)
    _, length, _, channels = q.shape
    with on_device_of(q):
        plan = _Plan(q, k, total, eps, norm)
        y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _forward_kernel[plan.grid](
            q, k, plan.stats, plan.starts, y, eps, length, plan.block_length, plan.n_blocks, channels, *q.stride()[:3],
            *k.stride()[:3], SHIFTED=channels > WIDEST_UNSHIFTED, CAUSAL=causal, HAS_EPS=eps != 0,
            **plan.meta,
        )  # fmt: skip
    return y, plan.starts[:, -1].clone()


def backward(
    dy: Tensor, dtotal: Tensor | None, q: Tensor, k: Tensor, total: Tensor | None, eps: float, causal: bool, norm: str
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dtotal_in) of `forward`."""
    dy, q, k = _unit_stride(dy), _unit_stride(q), _unit_stride(k)
    batch, length, heads, channels = q.shape
    with on_device_of(q):
        plan = _Plan(q, k, total, eps, norm)
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        sums = torch.empty((batch, plan.n_blocks, heads, channels), dtype=torch.float32, device=q.device)
        _backward_q_kernel[plan.grid](
            dy, q, k, plan.stats, plan.starts, dq, dk, sums, eps, length, plan.block_length, plan.n_blocks, channels,
            *dy.stride()[:3], *q.stride()[:3], *k.stride()[:3], SHIFTED=channels > WIDEST_UNSHIFTED, CAUSAL=causal,
            HAS_EPS=eps != 0, **plan.meta,
        )  # fmt: skip
        starts = _scan(sums, None if dtotal is None else dtotal.contiguous(), reverse=True)
        _backward_k_kernel[plan.grid](
            k, plan.stats, starts, dk, eps, length, plan.block_length, plan.n_blocks, channels, *k.stride()[:3],
            CAUSAL=causal, **plan.meta,
        )  # fmt: skip
    return dq, dk, starts[:, -1].clone()
