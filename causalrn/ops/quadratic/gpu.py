"""The quadratic relation on a GPU: fused Triton kernels that never hold a (T, T, D) tensor.

One program owns 32 * SUBROWS positions and walks over its partners TILE at a time. The lanes of a warp are
positions, the warps split the channels, and the partners of a tile sit in the registers of one thread, so sums
over partners need no exchange and sums over channels one per tile. Hence channel-major workspaces, and hence
no limit on D: a program first adds up the variances of a tile over all channels, then comes back for the
exponentials. Per channel of a pair that is one exponential (a special-function slot of 8 cycles per warp) beside
6 to 7 ordinary instructions, so the exponentials set the pace; moving a share of them to a polynomial costs
about 10 ordinary instructions each, more than the free issue slots, and is left out.

Rows whose exponentials would leave the range of float32 are done by a second launch, which finds the largest exponent of
each channel on its way; where there are none, its programs end at once. The first launch takes their gain for 0.

The backward runs one such kernel for dq and one for dk (own and partner change places) without atomics:
deterministic, at two exponentials per channel of a pair, one in each kernel.
"""

# Triton's compile-time parameters are in capitals and typed by what they become.
# ruff: noqa: N803, N806
# pyright: reportArgumentType=false, reportAssignmentType=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.ops.quadratic.exponents import beyond_range
from causalrn.ops.quadratic.gpu_packing import first_key, last_key, pack, unpack, window_span
from causalrn.ops.quadratic.gpu_pairs import (
    LANES,
    MASKED,
    activate,
    activation_slope,
    pair_mean,
    pair_std,
    pair_weight,
)
from causalrn.ops.triton_common import INTERPRETED, LOG2_E, ceil_div, on_device_of

LN_2 = 0.6931471805599453

# One warp per channel of a step. A tile stays below 32 partners: up to there Triton lets each thread read its
# partners as 16-byte broadcasts, above it stages every step through shared memory with two barriers.
TUNED = [
    triton.Config({"SUBROWS": subrows, "TILE": tile, "STEP": warps}, num_warps=warps)
    for subrows, tile, warps in ((2, 16, 4), (2, 16, 8), (1, 16, 4), (1, 16, 8), (4, 8, 4), (2, 8, 8))
]
# The interpreter takes the fewest steps over the channels.
CONFIGS = TUNED[1:2] if INTERPRETED else TUNED
# For the second launch, which mostly has nothing to do that could be tuned on.
SHIFTED_CONFIG = TUNED[3] if INTERPRETED else TUNED[2]
KEY = ["channels", "GOAL", "NORM", "ACTIVATION", "PAIR_MEAN", "WEIGHTED"]


@triton.jit
def _balanced(turn, n_blocks, LAST_IS_LONGEST: tl.constexpr):
    """The block to do in this turn: long ones first and falling, then short ones rising.

    Blocks that share a multiprocessor then add up to the same work when all fit at once.
    """
    half = (n_blocks + 1) // 2
    block = tl.where(turn < half, n_blocks - 1 - turn, turn - half)
    return block if LAST_IS_LONGEST else n_blocks - 1 - block


@triton.autotune(CONFIGS, key=KEY, reset_to_zero=["result"])
@triton.jit(do_not_specialize=["own_length", "partner_length", "n_keys", "channels", "groups", "unit"])
def _relation_kernel(
    own, partner, own_mean, partner_mean, grad, result, gain, dgain, tops, shifted, window, slope, eps,
    own_length, partner_length, n_keys, channels, padded_channels, own_padded, partner_padded, groups, heads, unit,
    GOAL: tl.constexpr, CAUSAL: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    PAIR_MEAN: tl.constexpr, WEIGHTED: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SLOPE: tl.constexpr, SHIFTED: tl.constexpr,
    SUBROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Adds to `result` what GOAL asks for: "out" and "dq" own queries, "dk" owns keys; "dq" and "dk" read `grad`.

    Tensors are channel-major, (groups = B*H, padded_channels, *_padded); `grad` is divided by the numbers of
    reachable keys. Unless WEIGHTED (anything but plain exponentials), logarithms are to base 2, the weight of a
    pair is in its shift, and gradients come out times log2(e).

    SHIFTED: the queries with a gain other than 0, which lie between the two indices in `shifted` (2, heads), are summed
    relative to the largest exponent of each channel, `tops`, laid out as the queries: "out" raises it from far below
    every exponent and clears what `result` held; for the other queries it holds 0, and nothing is added.
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
    if SHIFTED:
        first_shifted = tl.load(shifted + head)
        last_shifted = tl.load(shifted + heads + head)
        if OWN_IS_QUERY:
            high = tl.where((start <= last_shifted) & (start + ROWS > first_shifted), high, -1)
        else:
            low = tl.maximum(low, first_shifted + partner_shift)
            high = tl.minimum(high, last_shifted + partner_shift)
    low = tl.maximum(low - partner_shift, 0) // TILE * TILE

    for tile in range(low, high - partner_shift + 1, TILE):
        partner_index = tile + tl.arange(0, TILE)[:, None, None]
        mean = pair_mean(
            own_mean + group * own_padded, partner_mean + group * partner_padded, own_index, partner_index,
            groups * own_padded, groups * partner_padded, PAIR_MEAN,
        )  # fmt: skip
        scale = tl.full((TILE, SUBROWS, LANES), UNIT, tl.float32)
        if NORM != "none":
            std = pair_std(
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
        reachable, weight = pair_weight(i, j, n_keys, span, pair_slope, CAUSAL, HAS_SLOPE)
        if SHIFTED:
            reachable = reachable & (pair_gain != 0.0)
            log_weight = tl.where(reachable, -pair_slope * tl.abs(i - j).to(tl.float32), MASKED)
        # A scale of 0 alone silences a pair in the backward, where all that it gives is a multiple of the scale.
        scale = tl.where(reachable, scale, 0.0)
        shift = -mean * scale
        if BY_SHIFT:
            shift = tl.where(reachable, shift, MASKED)

        own_pointers = own + own_base + own_at
        partner_pointers = partner + partner_base + tile + partner_at
        result_pointers = result + own_base + own_at
        # This tile reads back what the last one has added to `result`, which must be visible by then.
        tl.debug_barrier()
        if GOAL == "out":
            top_pointers = tops + own_base + own_at if SHIFTED else result_pointers
            for _ in range(0, padded_channels, STEP):
                x = tl.load(own_pointers)[None] + tl.load(partner_pointers)[:, None, :, None]
                z = x * scale[:, :, None, :]
                if PAIR_MEAN or BY_SHIFT:
                    z += shift[:, :, None, :]
                if SHIFTED:
                    exponent = z * pair_gain[:, :, None, :] + log_weight[:, :, None, :]
                    top = tl.load(top_pointers)
                    largest = tl.maximum(top, tl.max(exponent, 0))
                    value = tl.exp2((exponent - largest[None]) * LOG2_E)
                    before = tl.load(result_pointers) * tl.exp2((top - largest) * LOG2_E)
                    tl.store(result_pointers, before + tl.sum(value, 0))
                    tl.store(top_pointers, largest)
                    top_pointers += own_step
                else:
                    if WEIGHTED:
                        value = activate(z * pair_gain[:, :, None, :], ACTIVATION) * weight[:, :, None, :]
                    else:
                        value = tl.exp2(z)
                    tl.store(result_pointers, tl.load(result_pointers) + tl.sum(value, 0))
                own_pointers += own_step
                partner_pointers += partner_step
                result_pointers += own_step
        else:
            query_at = own_base + own_at if OWN_IS_QUERY else partner_base + tile + partner_at
            grad_pointers = grad + query_at
            top_pointers = tops + query_at if SHIFTED else grad_pointers
            # Sum over the channels of dL/dz * z.
            inner = tl.zeros((TILE, SUBROWS, STEP, LANES), tl.float32)
            slope_scale = scale * pair_gain if WEIGHTED else scale
            for _ in range(0, padded_channels, STEP):
                x = tl.load(own_pointers)[None] + tl.load(partner_pointers)[:, None, :, None]
                z = x * scale[:, :, None, :]
                if PAIR_MEAN or BY_SHIFT:
                    z += shift[:, :, None, :]
                if SHIFTED:
                    exponent = z * pair_gain[:, :, None, :] + log_weight[:, :, None, :]
                    top = tl.load(top_pointers)
                    exponent -= top[None] if OWN_IS_QUERY else top[:, None, :, None]
                    value = tl.exp2(exponent * LOG2_E)
                    top_pointers += own_step if OWN_IS_QUERY else partner_step
                elif WEIGHTED:
                    value = activation_slope(z * pair_gain[:, :, None, :], ACTIVATION) * weight[:, :, None, :]
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
                mean = pair_mean(
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
        mine = pair_gain != 0.0 if SHIFTED else None
        tl.store(dgain + group * own_padded + own_index, gain_grad, mask=mine)


def _prepare(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Channel-major copy of x, and its means.

    bfloat16 is centred at once: that rounds 2^16 times finer than its own digits. Centring float32 would round
    away the digits that matter when q_i nearly cancels k_j, so there each pair is centred after its sum.
    """
    if norm != "layer":
        return pack(x)
    return pack(x, centre="store" if x.dtype == torch.float32 else "subtract")


class Shifted(NamedTuple):
    """The second launch's arguments.

    Attributes:
        gain: 0 but in the rows beyond the range, (Tq, H).
        span: index of the first and the last of these rows, per head, int32.
        shift: channel-major.
    """

    gain: Tensor
    span: Tensor
    shift: Tensor


def _split(
    terms: PairTerms, n_keys: int, channels: int, causal: bool
) -> tuple[Tensor, PairTerms, Tensor, Tensor]:
    """The mask (Tq, H) of rows that would need a shift without a window.

    Also gives the terms of the other rows, with a gain of 0 in these; the gain of these rows, with 0 in the others; and
    their span.
    """
    gain = terms.gain
    assert gain is not None
    positions = torch.arange(n_keys - len(gain), n_keys, device=gain.device)[:, None]
    count = positions + 1 if causal else torch.full_like(positions, n_keys)
    rows = beyond_range(gain, count, channels, terms.slope)
    index = torch.arange(len(gain), device=gain.device, dtype=torch.int32)[:, None]
    span = torch.stack([torch.where(rows, index, 2**30).amin(0), torch.where(rows, index, -1).amax(0)])
    return rows, terms._replace(gain=gain.masked_fill(rows, 0)), gain.masked_fill(~rows, 0), span


def _launch(
    goal: str, own: tuple[Tensor, Tensor], partner: tuple[Tensor, Tensor], grad: Tensor | None, lengths: tuple[int, int],
    channels: int, heads: int, terms: PairTerms, rule: PairRule, shifted: Shifted | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernel; gives its result and the gain's gradient, both channel-major."""
    packed, mean = own
    gain, window, slope = (x if x is None else x.contiguous() for x in terms)
    groups, padded_channels, own_padded = packed.shape
    n_own = lengths[goal == "dk"]
    result = torch.zeros_like(packed)
    needs_gain = gain is not None and goal == "dq"
    dgain = torch.empty(groups, own_padded if needs_gain else 0, dtype=torch.float32, device=packed.device)

    def run(kernel: Any, gain: Tensor | None, shift: Tensor | None, span: Tensor | None, **config: int) -> None:  # fmt: skip
        kernel[lambda meta: (groups * ceil_div(n_own, 32 * meta["SUBROWS"]),)](
            packed, partner[0], mean, partner[1], grad, result, gain, dgain, shift, span, window, slope, rule.eps,
            n_own, lengths[goal != "dk"], lengths[1], channels, padded_channels, own_padded, partner[0].shape[2],
            groups, heads, 1, GOAL=goal, CAUSAL=rule.causal, NORM=rule.norm, ACTIVATION=rule.activation,
            PAIR_MEAN=mean.shape[2] > 0, WEIGHTED=rule.activation != "exp" or gain is not None or slope is not None,
            HAS_GAIN=gain is not None, HAS_WINDOW=window is not None, HAS_SLOPE=slope is not None,
            SHIFTED=shift is not None, **config,
        )  # fmt: skip

    run(_relation_kernel, gain, None, None)
    if shifted is not None:
        config = {**SHIFTED_CONFIG.kwargs, "num_warps": SHIFTED_CONFIG.num_warps}
        run(_relation_kernel.fn, shifted.gain, shifted.shift, shifted.span, **config)
    return result, dgain


def forward(q: Tensor, k: Tensor, terms: PairTerms, rule: PairRule, shift: Tensor | None = None) -> Tensor:
    """The operator's value on q (B, Tq, H, D) and k (B, Tk, H, D), Tq <= Tk, of one dtype.

    Fills in the rows of `shift` (B, Tq, H, D), zeros, that go beyond the range.
    """
    _, n_queries, heads, channels = q.shape
    n_keys = k.shape[1]
    with on_device_of(q):
        sides = _prepare(q, rule.norm), _prepare(k, rule.norm)
        shifted = None
        if shift is not None and terms.gain is not None:
            rows, terms, their_gain, span = _split(terms, n_keys, channels, rule.causal)
            # Far below every exponent, but with a finite difference from it.
            start = torch.where(rows, MASKED.value, 0.0)[None, :, :, None].expand_as(shift)
            shifted = Shifted(their_gain, span, pack(start)[0])
        result, _ = _launch("out", *sides, None, (n_queries, n_keys), channels, heads, terms, rule, shifted)
        if shift is not None and shifted is not None:
            shift.copy_(unpack(shifted.shift, shift))
        return unpack(result, q, divide=True, n_keys=n_keys, window=terms.window, causal=rule.causal)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, terms: PairTerms, rule: PairRule, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients with respect to q, k and gain (None without a gain), with the shift of the forward pass."""
    batch, n_queries, heads, channels = q.shape
    n_keys = k.shape[1]
    with on_device_of(q):
        queries, keys = _prepare(q, rule.norm), _prepare(k, rule.norm)
        packed_grad, _ = pack(grad, divide=True, n_keys=n_keys, window=terms.window, causal=rule.causal)
        shifted = None
        if shift is not None and terms.gain is not None:
            _, terms, their_gain, span = _split(terms, n_keys, channels, rule.causal)
            shifted = Shifted(their_gain, span, pack(shift)[0])
        setting = (packed_grad, (n_queries, n_keys), channels, heads, terms, rule, shifted)
        plain = rule.activation == "exp" and terms.gain is None and terms.slope is None
        finish = {"factor": LN_2 if plain else 1.0, "centre": rule.norm == "layer"}
        result, dgain = _launch("dq", queries, keys, *setting)
        dq = unpack(result, q, **finish)
        result, _ = _launch("dk", keys, queries, *setting)
        dk = unpack(result, k, **finish)
        if terms.gain is None:
            return dq, dk, None
        return dq, dk, dgain.view(batch, heads, -1)[..., :n_queries].sum(0).T.contiguous()
