"""Arithmetic on rows of (heads, channels) inside Triton kernels: a row is a tuple of vectors, so many per head.

Triton's own tiles are powers of two in every dimension; three vectors of 256 hold 768 channels without padding.
Every function takes the geometry HEADS, CHUNKS (vectors per head) and WIDTH (of a vector); vectors hold zeros behind
a head's channels, which MASKED (CHUNKS * WIDTH > channels) keeps up.
"""

# Triton's compile-time parameters are in capitals and typed by what they become; its tuples grow by concatenation.
# ruff: noqa: N803, RUF005
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from causalrn.ops.triton_common import LOG2_E


@triton.jit
def load_row(row, head_stride, channels, HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """The row at this address, in float32."""
    values = ()
    for head in tl.static_range(HEADS):
        for chunk in tl.static_range(CHUNKS):
            channel = chunk * WIDTH + tl.arange(0, WIDTH)
            at = row + head * head_stride + channel
            values = values + (tl.load(at, mask=channel < channels, other=0.0).to(tl.float32),)
    return values


@triton.jit
def store_row(
    row, values, head_stride, channels, HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr
):
    for head in tl.static_range(HEADS):
        for chunk in tl.static_range(CHUNKS):
            channel = chunk * WIDTH + tl.arange(0, WIDTH)
            value = values[head * CHUNKS + chunk].to(row.dtype.element_ty)
            tl.store(row + head * head_stride + channel, value, mask=channel < channels)


@triton.jit
def load_heads(at, HEADS: tl.constexpr):
    """One number per head."""
    values = ()
    for head in tl.static_range(HEADS):
        values = values + (tl.load(at + head),)
    return values


@triton.jit
def zeros_row(N: tl.constexpr, WIDTH: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros((WIDTH,), tl.float32),)
    return out


@triton.jit
def add(a, b, N: tl.constexpr):
    out = ()
    for n in tl.static_range(N):
        out = out + (a[n] + b[n],)
    return out


@triton.jit
def multiply(a, b, N: tl.constexpr):
    out = ()
    for n in tl.static_range(N):
        out = out + (a[n] * b[n],)
    return out


@triton.jit
def scale(a, factor, N: tl.constexpr):
    out = ()
    for n in tl.static_range(N):
        out = out + (a[n] * factor,)
    return out


@triton.jit
def total(a, FIRST: tl.constexpr, N: tl.constexpr):
    """Sum over N vectors from the FIRST on."""
    part = a[FIRST]
    for n in tl.static_range(1, N):
        part += a[FIRST + n]
    return tl.sum(part, 0)


@triton.jit
def dot(a, b, FIRST: tl.constexpr, N: tl.constexpr):
    part = a[FIRST] * b[FIRST]
    for n in tl.static_range(1, N):
        part += a[FIRST + n] * b[FIRST + n]
    return tl.sum(part, 0)


@triton.jit
def maximum(a, N: tl.constexpr):
    part = a[0]
    for n in tl.static_range(1, N):
        part = tl.maximum(part, a[n])
    return tl.max(part, 0)


@triton.jit
def _behind_zero(
    value, N: tl.constexpr, channels, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """Vector N of a row, with zeros behind a head's channels."""
    if MASKED and N % CHUNKS == CHUNKS - 1:
        value = tl.where((CHUNKS - 1) * WIDTH + tl.arange(0, WIDTH) < channels, value, 0.0)
    return value


@triton.jit
def subtract(
    x, means, channels, HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):
    """x minus one number per head."""
    out = ()
    for n in tl.static_range(HEADS * CHUNKS):
        out = out + (_behind_zero(x[n] - means[n // CHUNKS], n, channels, CHUNKS, WIDTH, MASKED),)
    return out


@triton.jit
def standardise(
    x, channels, HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    CENTRED: tl.constexpr,
):  # fmt: skip
    """x minus its heads' means, the means (0 unless CENTRED) and the standard deviations of the heads."""
    means = ()
    for head in tl.static_range(HEADS):
        means = means + (total(x, head * CHUNKS, CHUNKS) / channels if CENTRED else 0.0,)
    if CENTRED:
        x = subtract(x, means, channels, HEADS, CHUNKS, WIDTH, MASKED)
    stds = ()
    for head in tl.static_range(HEADS):
        stds = stds + (tl.sqrt(dot(x, x, head * CHUNKS, CHUNKS) / channels),)
    return x, means, stds


@triton.jit
def exp_norm(
    x, means, stds, channels, eps, HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """exp((x - mean) / (std + eps)), if SHIFTED divided by its maximum over the row."""
    logs = ()
    for n in tl.static_range(HEADS * CHUNKS):
        factor = LOG2_E / (stds[n // CHUNKS] + eps)
        logs = logs + (x[n] * factor - means[n // CHUNKS] * factor,)
    shift = maximum(logs, HEADS * CHUNKS) if SHIFTED else 0.0
    out = ()
    for n in tl.static_range(HEADS * CHUNKS):
        value = tl.exp2(logs[n] - shift if SHIFTED else logs[n])
        out = out + (_behind_zero(value, n, channels, CHUNKS, WIDTH, MASKED),)
    return out


@triton.jit
def pull(grad_dot_centred, std, inverse, size):
    """The deviation's part of the gradient, per unit of the centred value. It is 0 where the deviation is 0."""
    positive = std > 0.0
    along = inverse * inverse * grad_dot_centred / (size * tl.where(positive, std, 1.0))
    return tl.where(positive, along, 0.0)


@triton.jit
def standardise_backward(
    grad, centred, stds, channels, eps, HEADS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to x of (x - mean) / (std + eps), head by head."""
    out = ()
    for head in tl.static_range(HEADS):
        inverse = 1.0 / (stds[head] + eps)
        mean = total(grad, head * CHUNKS, CHUNKS) / channels if CENTRED else 0.0
        taken = pull(dot(grad, centred, head * CHUNKS, CHUNKS), stds[head], inverse, channels)
        for chunk in tl.static_range(CHUNKS):
            across = (grad[head * CHUNKS + chunk] - mean) * inverse
            # Behind the channels this is not zero: it is only stored.
            out = out + (across - centred[head * CHUNKS + chunk] * taken,)
    return out
