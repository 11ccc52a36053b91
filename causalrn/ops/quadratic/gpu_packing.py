"""Copies between token-major and channel-major layout on a GPU, and which keys a position reaches."""

# Triton's compile-time parameters are in capitals and typed by what they become.
# ruff: noqa: N803
# pyright: reportArgumentType=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrn.ops.triton_common import ceil_div

# Stands for "no window"; small enough that a position plus the span still fits 32 bits.
NO_WINDOW = tl.constexpr(1 << 30)
# Positions of a channel-major workspace are padded to a multiple of this: every tile size divides it.
POSITIONS_PADDING = 128
# Channels are padded to a multiple of this: the largest number of channels a quadratic program sums at once.
CHANNELS_PADDING = 8


def round_up(size: int, multiple: int) -> int:
    return ceil_div(size, multiple) * multiple


@triton.jit
def window_span(window, head, HAS_WINDOW: tl.constexpr):
    """Positions that a head reaches in one direction, its own included."""
    span = NO_WINDOW
    if HAS_WINDOW:
        span = tl.minimum(tl.load(window + head), NO_WINDOW)
    return span


@triton.jit
def first_key(position, span):
    return tl.maximum(position - span + 1, 0)


@triton.jit
def last_key(position, span, n_keys, CAUSAL: tl.constexpr):
    return position if CAUSAL else tl.minimum(position + span - 1, n_keys - 1)


@triton.jit
def _reachable_keys(position, span, n_keys, CAUSAL: tl.constexpr):
    return (last_key(position, span, n_keys, CAUSAL) - first_key(position, span) + 1).to(tl.float32)


@triton.jit(do_not_specialize=["length", "n_keys", "channels"])
def _pack_kernel(
    x, packed, mean, window,
    length, n_keys, channels, padded_channels, padded_length, heads, stride_batch, stride_time, stride_head,
    CENTRE: tl.constexpr, DIVIDE: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    head = group % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    x += (group // heads) * stride_batch + head * stride_head
    x_pointers = x + row.to(tl.int64)[:, None] * stride_time + column[None, :]
    inside = (row < length)[:, None]
    high = tl.zeros((ROWS,), tl.float32)
    low = tl.zeros((ROWS,), tl.float32)
    if CENTRE != "no":
        # float64: where q_i nearly cancels k_j, their means do too, and what is left has to keep its digits.
        total = tl.zeros((ROWS, COLUMNS), tl.float64)
        for start in range(0, channels, COLUMNS):
            mask = inside & (start + column < channels)[None, :]
            total += tl.load(x_pointers + start, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
        exact = tl.sum(total, 1) / channels
        high = exact.to(tl.float32)
        low = (exact - high.to(tl.float64)).to(tl.float32)
    if CENTRE == "store":
        tl.store(mean + group * padded_length + row, high)
        tl.store(mean + (tl.num_programs(1) + group) * padded_length + row, low)
    count = tl.full((ROWS,), 1.0, tl.float32)
    if DIVIDE:
        span = window_span(window, head, HAS_WINDOW)
        count = tl.where(row < length, _reachable_keys(row + (n_keys - length), span, n_keys, CAUSAL), 1.0)
    packed += group * padded_channels * padded_length
    for start in range(0, padded_channels, COLUMNS):
        mask = inside & (start + column < channels)[None, :]
        value = tl.load(x_pointers + start, mask=mask, other=0.0).to(tl.float32)
        if CENTRE == "subtract":
            value = tl.where(mask, (value - high[:, None]) - low[:, None], 0.0)
        if CENTRE == "store":
            # A padding channel at the mean adds nothing to a variance.
            value = tl.where(mask, value, high[:, None])
        if DIVIDE:
            value = tl.where(mask, value / count[:, None], 0.0)
        at = (start + column).to(tl.int64)[None, :] * padded_length + row[:, None]
        tl.store(packed + at, value, mask=(start + column < padded_channels)[None, :])


@triton.jit(do_not_specialize=["length", "n_keys", "channels"])
def _unpack_kernel(
    packed, out, window, factor,
    length, n_keys, channels, padded_channels, padded_length, heads,
    CENTRE: tl.constexpr, DIVIDE: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    head = group % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    packed += group * padded_channels * padded_length
    mean = tl.zeros((ROWS,), tl.float32)
    if CENTRE:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, channels, COLUMNS):
            at = (start + column).to(tl.int64)[None, :] * padded_length + row[:, None]
            total += tl.load(packed + at, mask=(start + column < channels)[None, :], other=0.0)
        mean = tl.sum(total, 1) / channels
    scale = tl.zeros((ROWS,), tl.float32) + factor
    if DIVIDE:
        span = window_span(window, head, HAS_WINDOW)
        count = _reachable_keys(row + (n_keys - length), span, n_keys, CAUSAL)
        scale = scale / tl.where(row < length, count, 1.0)
    out += ((group // heads) * length * heads + head) * channels
    for start in range(0, channels, COLUMNS):
        at = (start + column).to(tl.int64)[None, :] * padded_length + row[:, None]
        value = tl.load(packed + at, mask=(start + column < channels)[None, :], other=0.0)
        value = (value - mean[:, None]) * scale[:, None]
        to = row.to(tl.int64)[:, None] * (heads * channels) + (start + column)[None, :]
        mask = (row < length)[:, None] & (start + column < channels)[None, :]
        tl.store(out + to, value.to(out.dtype.element_ty), mask=mask)


def packed_shape(x: Tensor) -> tuple[int, int, int]:
    """Shape (B*H, padded D, padded T) of the channel-major copy of x (B, T, H, D)."""
    batch, length, heads, channels = x.shape
    return batch * heads, round_up(channels, CHANNELS_PADDING), round_up(length, POSITIONS_PADDING)


def pack(
    x: Tensor, *, centre: str = "no", divide: bool = False, n_keys: int = 0, window: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Channel-major float32 copy (B*H, padded D, padded T) of x (B, T, H, D), and the means (2, B*H, padded T).

    Neighbouring positions are neighbours in memory, which is what a thread per position wants. centre:
    "subtract" the mean over D, or "store" it as a sum of two float32 and copy x as it is. divide: by the
    number of keys each position reaches. Padded positions hold zeros.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    shape = packed_shape(x)
    packed = torch.empty(shape, dtype=torch.float32, device=x.device)
    mean = torch.empty(
        (2, shape[0], shape[2] if centre == "store" else 0), dtype=torch.float32, device=x.device
    )
    _, length, heads, channels = x.shape
    rows = 32
    _pack_kernel[(shape[2] // rows, shape[0])](
        x, packed, mean, window,
        length, n_keys, channels, shape[1], shape[2], heads, x.stride(0), x.stride(1), x.stride(2),
        CENTRE=centre, DIVIDE=divide, CAUSAL=causal, HAS_WINDOW=window is not None, ROWS=rows, COLUMNS=64,
    )  # fmt: skip
    return packed, mean


def unpack(
    packed: Tensor, like: Tensor, *, factor: float = 1.0, centre: bool = False, divide: bool = False,
    n_keys: int = 0, window: Tensor | None = None, causal: bool = True,
) -> Tensor:  # fmt: skip
    """The inverse of `pack`: contiguous, with the shape and dtype of `like`, times factor, minus its mean over D."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    _, length, heads, channels = like.shape
    rows = 32
    _unpack_kernel[(ceil_div(length, rows), packed.shape[0])](
        packed, out, window, factor,
        length, n_keys, channels, packed.shape[1], packed.shape[2], heads,
        CENTRE=centre, DIVIDE=divide, CAUSAL=causal, HAS_WINDOW=window is not None, ROWS=rows, COLUMNS=64,
    )  # fmt: skip
    return out
