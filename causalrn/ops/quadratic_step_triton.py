"""One decoding step of the quadratic relation on a GPU: programs share out the pool, which is read once.

Each program owns PART consecutive positions of one row and head, holds all channels of a few of them in registers, and
leaves their sum; the sums are added in order, so that the result is the same in every run.
"""

# Triton's compile-time parameters are in capitals and typed by what they become.
# ruff: noqa: N803
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrn.ops.quadratic_triton import _activation
from causalrn.ops.triton_common import LOG2_E, ceil_div, on_device_of, window_span

# Positions of one program: enough programs to fill a GPU from a few thousand positions on.
PART = 64
# Elements (positions, channels) that a program holds at a time.
TILE_ELEMENTS = 8192


@triton.jit(do_not_specialize=["channels", "stride_batch", "stride_position", "stride_head"])
def _step_kernel(
    q, pool, lengths, gain, window, slope, sums,
    eps, channels, heads, stride_batch, stride_position, stride_head,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SLOPE: tl.constexpr, PART_POSITIONS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    head = group % heads
    length = tl.load(lengths + group // heads)
    first = tl.maximum(length - window_span(window, head, HAS_WINDOW), 0)
    start = tl.maximum(part * PART_POSITIONS, first)
    stop = tl.minimum(part * PART_POSITIONS + PART_POSITIONS, length)
    column = tl.arange(0, WIDTH)
    inside = column < channels
    query = tl.load(q + group * channels + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0
    if HAS_GAIN:
        factor = tl.load(gain + group)
    rate = 0.0
    if HAS_SLOPE:
        rate = tl.load(slope + head) * LOG2_E
    pool += (group // heads) * stride_batch + head * stride_head
    total = tl.zeros((WIDTH,), tl.float32)
    for position in range(start, stop, ROWS):
        row = position + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * stride_position + column[None, :]
        # Sums and norms are taken of q + k itself, in which the two have cancelled already.
        x = query[None, :] + tl.load(pool + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x, 0.0)
        if NORM == "layer":
            x = tl.where(mask, x - (tl.sum(x, 1) / channels)[:, None], 0.0)
        if NORM != "none":
            x = x / (tl.sqrt(tl.sum(x * x, 1) / channels) + eps)[:, None]
        value = _activation(x * factor, ACTIVATION)
        if HAS_SLOPE:
            value *= tl.exp2((row - (length - 1)).to(tl.float32) * rate)[:, None]
        total += tl.sum(tl.where(mask, value, 0.0), 0)
    at = (group * tl.num_programs(0) + part) * channels + column
    tl.store(sums + at, total, mask=inside)


def forward(
    q: Tensor,
    pool: Tensor,
    lengths: Tensor,
    gain: Tensor | None,
    window: Tensor | None,
    slope: Tensor | None,
    eps: float,
    norm: str,
    activation: str,
) -> Tensor:
    """The operator's value; arguments as `relation_quadratic_step`, not float64."""
    batch, positions, heads, channels = pool.shape
    if pool.stride(3) != 1:
        pool = pool.contiguous()
    parts = ceil_div(positions, PART)
    sums = torch.empty(batch * heads, parts, channels, dtype=torch.float32, device=q.device)
    width = triton.next_power_of_2(channels)
    with on_device_of(q):
        _step_kernel[(parts, batch * heads)](
            q.contiguous(), pool, lengths.to(torch.int32), *(x if x is None else x.contiguous() for x in (gain, window, slope)), sums,
            eps, channels, heads, *pool.stride()[:3],
            NORM=norm, ACTIVATION=activation, HAS_GAIN=gain is not None, HAS_WINDOW=window is not None,
            HAS_SLOPE=slope is not None, PART_POSITIONS=PART, ROWS=max(1, min(16, TILE_ELEMENTS // width)),
            WIDTH=width, num_warps=4 if width <= 1024 else 8,
        )  # fmt: skip
    count = lengths[:, None] if window is None else torch.minimum(lengths[:, None], window)
    return (sums.sum(1).view(batch, heads, channels) / count[..., None]).to(q.dtype)
