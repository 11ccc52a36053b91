"""Functions of one pair for the Triton kernels of the quadratic relation: its mean, deviation, weight and activation."""

# Triton's compile-time parameters are in capitals, are typed by what they become, and need an else beside a return.
# ruff: noqa: N803, RET505

import triton
import triton.language as tl

from causalrn.ops.triton_common import LOG2_E

# Exponent of a pair out of reach: exp2 gives 0, and 0 times it stays finite, unlike with infinity.
MASKED = tl.constexpr(-1e30)
INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
LANES = tl.constexpr(32)


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "exp":
        return tl.exp2(u * LOG2_E)
    elif ACTIVATION == "relu":
        return tl.maximum(u, 0.0)
    elif ACTIVATION == "elu":
        return tl.where(u > 0.0, u, tl.exp2(tl.minimum(u, 0.0) * LOG2_E) - 1.0)
    else:
        return 0.5 * u * (1.0 + tl.erf(u * INVERSE_SQRT_2))


@triton.jit
def activation_slope(u, ACTIVATION: tl.constexpr):
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
def pair_mean(
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
def pair_std(
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
def pair_weight(i, j, n_keys, span, slope, CAUSAL: tl.constexpr, HAS_SLOPE: tl.constexpr):
    """A mask of the pairs whose j is reachable from i, and the weight of each pair."""
    distance = tl.abs(i - j)
    reachable = (i < n_keys) & (j < n_keys) & (distance < span)
    if CAUSAL:
        reachable = reachable & (j <= i)
    weight = tl.where(reachable, 1.0, 0.0)
    if HAS_SLOPE:
        weight = weight * tl.exp2(-slope * LOG2_E * distance.to(tl.float32))
    return reachable, weight
