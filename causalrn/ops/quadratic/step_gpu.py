"""One decoding step of the quadratic relation on a GPU: programs share out the cache, which is read once.

Each program owns PART consecutive positions of one row and head, holds all channels of a few of them in registers, and
leaves their sum; the sums are added in order, so that the result is the same in every run.
"""

# Triton's compile-time parameters are in capitals and typed by what they become.
# ruff: noqa: N803
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.ops.quadratic.exponents import exponent_range
from causalrn.ops.quadratic.gpu_packing import window_span
from causalrn.ops.quadratic.gpu_pairs import MASKED, activate
from causalrn.ops.triton_common import LOG2_E, ceil_div, on_device_of

# Positions of one program: enough programs to fill a GPU from a few thousand positions on.
PART = 64
# Elements (positions, channels) that a program holds at a time.
TILE_ELEMENTS = 8192


@triton.jit
def _sum_rows(z, mask, distance, rate, ACTIVATION: tl.constexpr, HAS_SLOPE: tl.constexpr):
    value = activate(z, ACTIVATION)
    if HAS_SLOPE:
        value *= tl.exp2(distance.to(tl.float32) * rate)[:, None]
    return tl.sum(tl.where(mask, value, 0.0), 0)


@triton.jit(do_not_specialize=["channels", "stride_batch", "stride_position", "stride_head"])
def _step_kernel(
    q, cache, lengths, gain, window, slope, sums, tops,
    eps, norm_bound, exponent_range, channels, heads, stride_batch, stride_position, stride_head,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SLOPE: tl.constexpr, SHIFTED: tl.constexpr, PART_POSITIONS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
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
    cache += (group // heads) * stride_batch + head * stride_head
    total = tl.zeros((WIDTH,), tl.float32)
    if SHIFTED:
        # A row beyond the range keeps the largest exponent of each channel, which starts far below all exponents.
        shifted = tl.abs(factor) * norm_bound + tl.log((length - first).to(tl.float32)) > exponent_range
        top = tl.zeros((WIDTH,), tl.float32) + tl.where(shifted, MASKED, 0.0)
    for position in range(start, stop, ROWS):
        row = position + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * stride_position + column[None, :]
        # Sums and norms are taken of q + k itself, in which the two have cancelled already.
        x = query[None, :] + tl.load(cache + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x, 0.0)
        if NORM == "layer":
            x = tl.where(mask, x - (tl.sum(x, 1) / channels)[:, None], 0.0)
        if NORM != "none":
            x = x / (tl.sqrt(tl.sum(x * x, 1) / channels) + eps)[:, None]
        if SHIFTED:
            if shifted:
                exponent = x * (factor * LOG2_E)
                if HAS_SLOPE:
                    exponent += ((row - (length - 1)).to(tl.float32) * rate)[:, None]
                exponent = tl.where(mask, exponent, MASKED)
                largest = tl.maximum(top, tl.max(exponent, 0))
                total = total * tl.exp2(top - largest) + tl.sum(tl.exp2(exponent - largest[None, :]), 0)
                top = largest
            else:
                total += _sum_rows(x * factor, mask, row - (length - 1), rate, ACTIVATION, HAS_SLOPE)
        else:
            total += _sum_rows(x * factor, mask, row - (length - 1), rate, ACTIVATION, HAS_SLOPE)
    if SHIFTED:
        tl.store(tops + (group * tl.num_programs(0) + part) * channels + column, top, mask=inside)
    at = (group * tl.num_programs(0) + part) * channels + column
    tl.store(sums + at, total, mask=inside)


def step(
    q: Tensor,
    cache: Tensor,
    lengths: Tensor,
    terms: PairTerms,
    rule: PairRule,
    shift: Tensor | None = None,
) -> Tensor:
    """The value of one decoding step, not in float64; fills in the rows of `shift`, zeros, that go beyond the range."""
    gain, window, slope = terms
    batch, positions, heads, channels = cache.shape
    if cache.stride(3) != 1:
        cache = cache.contiguous()
    parts = ceil_div(positions, PART)
    sums = torch.empty(batch * heads, parts, channels, dtype=torch.float32, device=q.device)
    tops = None if shift is None else torch.empty_like(sums)
    width = triton.next_power_of_2(channels)
    with on_device_of(q):
        _step_kernel[(parts, batch * heads)](
            q.contiguous(), cache, lengths.to(torch.int32), *(x if x is None else x.contiguous() for x in (gain, window, slope)), sums, tops,
            rule.eps, math.sqrt(channels), exponent_range(slope), channels, heads, *cache.stride()[:3],
            NORM=rule.norm, ACTIVATION=rule.activation, HAS_GAIN=gain is not None, HAS_WINDOW=window is not None,
            HAS_SLOPE=slope is not None, SHIFTED=shift is not None, PART_POSITIONS=PART, ROWS=max(1, min(16, TILE_ELEMENTS // width)),
            WIDTH=width, num_warps=4 if width <= 1024 else 8,
        )  # fmt: skip
    if shift is not None and tops is not None:
        # In base 2.
        top = tops.amax(1, keepdim=True)
        sums *= torch.exp2(tops - top)
        shift.copy_((top * math.log(2)).view_as(shift))
    count = lengths[:, None] if window is None else torch.minimum(lengths[:, None], window)
    return (sums.sum(1).view(batch, heads, channels) / count[..., None]).to(q.dtype)
