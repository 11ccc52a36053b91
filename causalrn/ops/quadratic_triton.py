"""The quadratic relation on a GPU: fused Triton kernels that never hold a (T, T, D) tensor.

One program owns 32 * SUBROWS positions and walks over its partners TILE at a time. The lanes of a warp are
positions, the warps split the channels, and the partners of a tile sit in the registers of one thread, so sums
over partners need no exchange and sums over channels one per tile. Hence channel-major workspaces, and hence
no limit on D: a program first adds up the variances of a tile over all channels, then comes back for the
exponentials. Per channel of a pair that is one exponential (a special-function slot of 8 cycles per warp) beside
6 to 7 ordinary instructions, so the exponentials set the pace; moving a share of them to a polynomial costs
about 10 ordinary instructions each, more than the free issue slots, and is left out.

The backward runs one such kernel for dq and one for dk (own and partner change places) without atomics:
deterministic, at two exponentials per channel of a pair, one in each kernel.
"""

# Triton's compile-time parameters are in capitals, are typed by what they become, and need an else beside a return.
# ruff: noqa: N803, N806, RET505
# pyright: reportArgumentType=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrn.ops.triton_common import (
    INTERPRETED,
    LOG2_E,
    ceil_div,
    first_key,
    last_key,
    on_device_of,
    pack,
    unpack,
    window_span,
)

LN_2 = 0.6931471805599453
# Exponent of a pair out of reach: exp2 gives 0, and 0 times it stays finite, unlike with infinity.
MASKED = tl.constexpr(-1e30)
INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
LANES = tl.constexpr(32)

# One warp per channel of a step. A tile stays below 32 partners: up to there Triton lets each thread read its
# partners as 16-byte broadcasts, above it stages every step through shared memory with two barriers.
TUNED = [
    triton.Config({"SUBROWS": subrows, "TILE": tile, "STEP": warps}, num_warps=warps)
    for subrows, tile, warps in ((2, 16, 4), (2, 16, 8), (1, 16, 4), (1, 16, 8), (4, 8, 4), (2, 8, 8))
]
CONFIGS = TUNED[:1] if INTERPRETED else TUNED
KEY = ["channels", "GOAL", "NORM", "ACTIVATION", "PAIR_MEAN", "WEIGHTED"]


@triton.jit
def _balanced(turn, n_blocks, LAST_IS_LONGEST: tl.constexpr):
    """The block to do in this turn: long ones first and falling, then short ones rising.

    Blocks that share a multiprocessor then add up to the same work when all fit at once.
    """
    half = (n_blocks + 1) // 2
    block = tl.where(turn < half, n_blocks - 1 - turn, turn - half)
    return block if LAST_IS_LONGEST else n_blocks - 1 - block


@triton.jit
def _activation(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "exp":
        return tl.exp2(u * LOG2_E)
    elif ACTIVATION == "relu":
        return tl.maximum(u, 0.0)
    elif ACTIVATION == "elu":
        return tl.where(u > 0.0, u, tl.exp2(tl.minimum(u, 0.0) * LOG2_E) - 1.0)
    else:
        return 0.5 * u * (1.0 + tl.erf(u * INVERSE_SQRT_2))


@triton.jit
def _activation_slope(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "exp":
        return tl.exp2(u * LOG2_E)
    elif ACTIVATION == "relu":
        return tl.where(u > 0.0, 1.0, 0.0)
    elif ACTIVATION == "elu":
        return tl.exp2(tl.minimum(u, 0.0) * LOG2_E)
    else:
        density = tl.exp2(u * u * (LOG2_E * -0.5)) * INVERSE_SQRT_2_PI
        return 0.5 * (1.0 + tl.erf(u * INVERSE_SQRT_2)) + u * density


@triton.jit
def _pair_mean(
    own_mean, partner_mean, own_at, partner_at, own_groups, partner_groups, PAIR_MEAN: tl.constexpr
):
    """Mean over the channels of q_i + k_j, (TILE, SUBROWS, LANES); the leading parts cancel before the rest is added."""
    if PAIR_MEAN:
        high = tl.load(own_mean + own_at) + tl.load(partner_mean + partner_at)
        return high + (
            tl.load(own_mean + own_groups + own_at) + tl.load(partner_mean + partner_groups + partner_at)
        )
    else:
        return tl.zeros((1, 1, 1), tl.float32)


@triton.jit
def _pair_std(
    own_pointers, partner_pointers, mean, own_step, partner_step, channels, padded_channels,
    PAIR_MEAN: tl.constexpr, TILE: tl.constexpr, SUBROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Standard deviation (root mean square without a mean) of q_i + k_j over the channels, (TILE, SUBROWS, LANES).

    Squares of the sums themselves: the expanded |q|^2 + |k|^2 + 2 q.k loses its digits where q_i is close to -k_j.
    """
    squares = tl.zeros((TILE, SUBROWS, STEP, LANES), tl.float32)
    for _ in range(0, padded_channels, STEP):
        x = tl.load(own_pointers)[None] + tl.load(partner_pointers)[:, None, :, None]
        if PAIR_MEAN:
            x -= mean[:, :, None, :]
        squares += x * x
        own_pointers += own_step
        partner_pointers += partner_step
    return tl.sqrt(tl.sum(squares, 2) / channels)


@triton.jit
def _pair_weight(i, j, n_keys, span, slope, CAUSAL: tl.constexpr, HAS_SLOPE: tl.constexpr):
    """Whether j is reachable from i, and the weight of the pair."""
    distance = tl.abs(i - j)
    reachable = (i < n_keys) & (j < n_keys) & (distance < span)
    if CAUSAL:
        reachable = reachable & (j <= i)
    weight = tl.where(reachable, 1.0, 0.0)
    if HAS_SLOPE:
        weight = weight * tl.exp2(-slope * LOG2_E * distance.to(tl.float32))
    return reachable, weight


@triton.autotune(CONFIGS, key=KEY, reset_to_zero=["result"])
@triton.jit(do_not_specialize=["own_length", "partner_length", "n_keys", "channels", "groups", "unit"])
def _relation_kernel(
    own, partner, own_mean, partner_mean, grad, result, gain, dgain, window, slope, eps,
    own_length, partner_length, n_keys, channels, padded_channels, own_padded, partner_padded, groups, heads, unit,
    GOAL: tl.constexpr, CAUSAL: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    PAIR_MEAN: tl.constexpr, WEIGHTED: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SLOPE: tl.constexpr, SUBROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds to `result` what GOAL asks for: "out" and "dq" own queries, "dk" owns keys; "dq" and "dk" read `grad`.

    Tensors are channel-major, (groups = B*H, padded_channels, *_padded); `grad` is divided by the numbers of
    reachable keys. Unless WEIGHTED (anything but plain exponentials), logarithms are to base 2, the weight of a
    pair is in its shift, and gradients come out times log2(e).
    """
    OWN_IS_QUERY: tl.constexpr = GOAL != "dk"
    UNIT: tl.constexpr = 1.0 if WEIGHTED else LOG2_E
    ROWS: tl.constexpr = SUBROWS * LANES
    BY_SHIFT: tl.constexpr = GOAL == "out" and not WEIGHTED
    group = (tl.program_id(0) % groups).to(tl.int64)
    head = group % heads
    start = ROWS * _balanced(tl.program_id(0) // groups, tl.cdiv(own_length, ROWS), OWN_IS_QUERY)
    lane = tl.arange(0, SUBROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    # `unit` is 1: a stride that the compiler does not know keeps the lanes of a load where the arithmetic wants them.
    rows = tl.arange(0, SUBROWS)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    own_at = tl.arange(0, STEP)[None, :, None] * own_padded + rows * unit
    partner_at = tl.arange(0, STEP)[None, :] * partner_padded + tl.arange(0, TILE)[:, None]
    own_base = group * padded_channels * own_padded + start
    partner_base = group * padded_channels * partner_padded
    own_step = STEP * own_padded
    partner_step = STEP * partner_padded

    # Queries are the last positions: an index plus its shift is a position.
    own_shift = n_keys - own_length
    partner_shift = n_keys - partner_length
    own_index = start + lane[None]
    span = window_span(window, head, HAS_WINDOW)
    pair_slope = tl.load(slope + head) if HAS_SLOPE else 0.0
    pair_gain = tl.full((1, 1, 1), 1.0, tl.float32)
    if HAS_GAIN and not OWN_IS_QUERY:
        # Loaded anew for each tile of queries: a variable keeps its shape through a loop.
        pair_gain = tl.full((TILE, 1, 1), 1.0, tl.float32)
    if HAS_GAIN and OWN_IS_QUERY:
        pair_gain = tl.load(gain + own_index * heads + head, mask=own_index < own_length, other=0.0)
    gain_grad = tl.zeros((1, SUBROWS, LANES), tl.float32)
    first = start + own_shift
    last = tl.minimum(first + ROWS, n_keys) - 1
    if OWN_IS_QUERY:
        low = first_key(first, span)
        high = last_key(last, span, n_keys, CAUSAL)
    else:
        low = first if CAUSAL else first_key(first, span)
        high = tl.minimum(last + span, n_keys) - 1
    low = tl.maximum(low - partner_shift, 0) // TILE * TILE

    for tile in range(low, high - partner_shift + 1, TILE):
        partner_index = tile + tl.arange(0, TILE)[:, None, None]
        mean = _pair_mean(
            own_mean + group * own_padded, partner_mean + group * partner_padded, own_index, partner_index,
            groups * own_padded, groups * partner_padded, PAIR_MEAN,
        )  # fmt: skip
        scale = tl.full((TILE, SUBROWS, LANES), UNIT, tl.float32)
        if NORM != "none":
            std = _pair_std(
                own + own_base + own_at, partner + partner_base + tile + partner_at, mean, own_step, partner_step,
                channels, padded_channels, PAIR_MEAN, TILE, SUBROWS, STEP,
            )  # fmt: skip
            scale = UNIT / (std + eps)
        if OWN_IS_QUERY:
            i, j = own_index + own_shift, partner_index + partner_shift
        else:
            i, j = partner_index + partner_shift, own_index + own_shift
            if HAS_GAIN:
                pair_gain = tl.load(
                    gain + partner_index * heads + head, mask=partner_index < partner_length, other=0.0
                )
        reachable, weight = _pair_weight(i, j, n_keys, span, pair_slope, CAUSAL, HAS_SLOPE)
        # A scale of 0 alone silences a pair in the backward, where all that it gives is a multiple of the scale.
        scale = tl.where(reachable, scale, 0.0)
        shift = -mean * scale
        if BY_SHIFT:
            shift = tl.where(reachable, shift, MASKED)

        own_pointers = own + own_base + own_at
        partner_pointers = partner + partner_base + tile + partner_at
        result_pointers = result + own_base + own_at
        # What the last tile added to `result` must be visible before it is read back.
        tl.debug_barrier()
        if GOAL == "out":
            for _ in range(0, padded_channels, STEP):
                x = tl.load(own_pointers)[None] + tl.load(partner_pointers)[:, None, :, None]
                z = x * scale[:, :, None, :]
                if PAIR_MEAN or BY_SHIFT:
                    z += shift[:, :, None, :]
                if WEIGHTED:
                    value = _activation(z * pair_gain[:, :, None, :], ACTIVATION) * weight[:, :, None, :]
                else:
                    value = tl.exp2(z)
                tl.store(result_pointers, tl.load(result_pointers) + tl.sum(value, 0))
                own_pointers += own_step
                partner_pointers += partner_step
                result_pointers += own_step
        else:
            grad_pointers = grad + (own_base + own_at if OWN_IS_QUERY else partner_base + tile + partner_at)
            # Sum over the channels of dL/dz * z.
            inner = tl.zeros((TILE, SUBROWS, STEP, LANES), tl.float32)
            slope_scale = scale * pair_gain if WEIGHTED else scale
            for _ in range(0, padded_channels, STEP):
                x = tl.load(own_pointers)[None] + tl.load(partner_pointers)[:, None, :, None]
                z = x * scale[:, :, None, :]
                if PAIR_MEAN or BY_SHIFT:
                    z += shift[:, :, None, :]
                if WEIGHTED:
                    value = (
                        _activation_slope(z * pair_gain[:, :, None, :], ACTIVATION) * weight[:, :, None, :]
                    )
                else:
                    value = tl.exp2(z)
                if OWN_IS_QUERY:
                    g = tl.load(grad_pointers)
                    inner += (value * g[None]) * z
                    total = tl.sum(value * slope_scale[:, :, None, :], 0) * g
                    grad_pointers += own_step
                else:
                    dz = value * tl.load(grad_pointers)[:, None, :, None]
                    inner += dz * z
                    total = tl.sum(dz * slope_scale[:, :, None, :], 0)
                    grad_pointers += partner_step
                tl.store(result_pointers, tl.load(result_pointers) + total)
                own_pointers += own_step
                partner_pointers += partner_step
                result_pointers += own_step
            inner_sum = tl.sum(inner, 2)
            gain_grad += tl.sum(inner_sum, 0)[None]
            if NORM != "none":
                # The deviation is read back from the scale; where rounding spoils it, eps has made its term negligible.
                std = UNIT / tl.where(scale > 0.0, scale, 1.0) - eps
                spread = (scale > 0.0) & (std > 0.0)
                pull = tl.where(
                    spread, slope_scale * inner_sum / (tl.where(spread, std, 1.0) * (UNIT * channels)), 0.0
                )
                # Read again rather than kept in registers meanwhile.
                mean = _pair_mean(
                    own_mean + group * own_padded, partner_mean + group * partner_padded, own_index, partner_index,
                    groups * own_padded, groups * partner_padded, PAIR_MEAN,
                )  # fmt: skip
                own_pointers = own + own_base + own_at
                partner_pointers = partner + partner_base + tile + partner_at
                result_pointers = result + own_base + own_at
                for _ in range(0, padded_channels, STEP):
                    x = tl.load(own_pointers)[None] + tl.load(partner_pointers)[:, None, :, None]
                    if PAIR_MEAN:
                        x -= mean[:, :, None, :]
                    total = tl.sum(x * pull[:, :, None, :], 0)
                    tl.store(result_pointers, tl.load(result_pointers) - total)
                    own_pointers += own_step
                    partner_pointers += partner_step
                    result_pointers += own_step
    if HAS_GAIN and GOAL == "dq":
        tl.store(dgain + group * own_padded + own_index, gain_grad)


def _prepare(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Channel-major copy of x, and its means.

    bfloat16 is centred at once: that rounds 2^16 times finer than its own digits. Centring float32 would round
    away the digits that matter when q_i nearly cancels k_j, so there each pair is centred after its sum.
    """
    if norm != "layer":
        return pack(x)
    return pack(x, centre="store" if x.dtype == torch.float32 else "subtract")


def _launch(
    goal: str, own: tuple[Tensor, Tensor], partner: tuple[Tensor, Tensor], grad: Tensor | None, lengths: tuple[int, int],
    channels: int, gain: Tensor | None, window: Tensor | None, slope: Tensor | None, eps: float, causal: bool,
    norm: str, activation: str, heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernel; gives its result and the gain's gradient, both channel-major."""
    packed, mean = own
    gain, window, slope = (x if x is None else x.contiguous() for x in (gain, window, slope))
    groups, padded_channels, own_padded = packed.shape
    n_own = lengths[goal == "dk"]
    result = torch.zeros_like(packed)
    needs_gain = gain is not None and goal == "dq"
    dgain = torch.empty(groups, own_padded if needs_gain else 0, dtype=torch.float32, device=packed.device)
    _relation_kernel[lambda meta: (groups * ceil_div(n_own, 32 * meta["SUBROWS"]),)](
        packed, partner[0], mean, partner[1], grad, result, gain, dgain, window, slope, eps,
        n_own, lengths[goal != "dk"], lengths[1], channels, padded_channels, own_padded, partner[0].shape[2], groups,
        heads, 1, GOAL=goal, CAUSAL=causal, NORM=norm, ACTIVATION=activation, PAIR_MEAN=mean.shape[2] > 0,
        WEIGHTED=activation != "exp" or gain is not None or slope is not None, HAS_GAIN=gain is not None,
        HAS_WINDOW=window is not None, HAS_SLOPE=slope is not None,
    )  # fmt: skip
    return result, dgain


def forward(
    q: Tensor, k: Tensor, gain: Tensor | None, window: Tensor | None, slope: Tensor | None, eps: float,
    causal: bool, norm: str, activation: str,
) -> Tensor:  # fmt: skip
    """`reference.relation_quadratic_reference` on q (B, Tq, H, D) and k (B, Tk, H, D), Tq <= Tk, of one dtype."""
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    n_keys = k.shape[1]
    with on_device_of(q):
        sides = _prepare(q, norm), _prepare(k, norm)
        result, _ = _launch(
            "out", *sides, None, (q.shape[1], n_keys), q.shape[3], gain, window, slope, eps, causal, norm,
            activation, q.shape[2],
        )  # fmt: skip
        return unpack(result, q, divide=True, n_keys=n_keys, window=window, causal=causal)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, gain: Tensor | None, window: Tensor | None, slope: Tensor | None, eps: float,
    causal: bool, norm: str, activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dq, dk, dgain) of `forward`; dgain, float32, is empty without a gain."""
    batch, n_queries, heads, channels = q.shape
    n_keys = k.shape[1]
    if q.numel() == 0:
        dgain = torch.zeros(
            (0,) if gain is None else (n_queries, heads), dtype=torch.float32, device=q.device
        )
        return torch.zeros_like(q), torch.zeros_like(k), dgain
    with on_device_of(q):
        queries, keys = _prepare(q, norm), _prepare(k, norm)
        packed_grad, _ = pack(grad, divide=True, n_keys=n_keys, window=window, causal=causal)
        setting = (
            packed_grad, (n_queries, n_keys), channels, gain, window, slope, eps, causal, norm, activation, heads,
        )  # fmt: skip
        plain = activation == "exp" and gain is None and slope is None
        finish = {"factor": LN_2 if plain else 1.0, "centre": norm == "layer"}
        result, dgain = _launch("dq", queries, keys, *setting)
        dq = unpack(result, q, **finish)
        result, _ = _launch("dk", keys, queries, *setting)
        dk = unpack(result, k, **finish)
        if gain is not None:
            dgain = dgain.view(batch, heads, -1)[..., :n_queries].sum(0).T.contiguous()
        return dq, dk, dgain
