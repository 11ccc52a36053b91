"""One decoding step of the quadratic relation as a PyTorch operator: one query per row against a pool of keys."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.ops import quadratic_step_native
from causalrn.ops.exponents import beyond_range, stays_in_range
from causalrn.ops.quadratic import arithmetic_dtype, check_choices, check_values
from causalrn.ops.reference import ACTIVATIONS, Activation, Norm, normalise

# Elements (B, positions, H, D) that the PyTorch path forms at a time.
BLOCK_ELEMENTS = 2**20
# All channels of a position have to fit into the registers of a Triton program.
MAX_TRITON_CHANNELS = 8192


def relation_quadratic_step(
    q: Float[Tensor, "B H D"],
    pool: Float[Tensor, "B S H D"],
    lengths: Int[Tensor, " B"],
    *,
    eps: float,
    norm: Norm = "layer",
    activation: Activation = "exp",
    gain: Float[Tensor, "B H"] | None = None,
    window: Int[Tensor, " H"] | None = None,
    slope: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H D"]:
    """The last row of `relation_quadratic`: the mean over the pool's positions j of act(gain_h norm(q_h + k_jh)).

    Row b stands at position lengths[b] - 1, whose own k is in the pool already. It reads the pool once. Not
    differentiable: decoding only.

    Args:
        q: receiving positions, one per row.
        pool: k of all positions so far, in any floating dtype; rows may be longer than their length.
        lengths: number of positions of each row that count, at least 1.
        eps: added to the standard deviation of q + k_j.
        norm: as `relation_quadratic`.
        activation: as `relation_quadratic`.
        gain: factor on the normalised pair, per row; 1 if None.
        window: only the last window_h positions count; all if None.
        slope: the weight of position j falls as exp(-slope_h (lengths[b] - 1 - j)); 0 if None.

    Returns:
        The mean over the reachable positions, in the dtype of q.

    Raises:
        ValueError: shapes that do not belong together, an unknown norm or activation, eps < 0, a length outside 1 to S, a
            window < 1 or a slope < 0 (the last three on a CPU only, where a look costs nothing).
    """
    arguments = convert(q, pool, lengths, gain, window, slope, eps, norm, activation)
    return torch.ops.causalrn.relation_quadratic_step(*arguments)


def relation_quadratic_step_shifted(
    q: Float[Tensor, "B H D"],
    pool: Float[Tensor, "B S H D"],
    lengths: Int[Tensor, " B"],
    *,
    eps: float,
    norm: Norm = "layer",
    activation: Activation = "exp",
    gain: Float[Tensor, "B H"] | None = None,
    window: Int[Tensor, " H"] | None = None,
    slope: Float[Tensor, " H"] | None = None,
) -> tuple[Float[Tensor, "B H D"], Float[Tensor, "B H D"] | None]:
    """The last row of `relation_quadratic_shifted`: `out` and `shift`, of which the mean is out exp(shift)."""
    q, pool, lengths, gain, *settings = convert(q, pool, lengths, gain, window, slope, eps, norm, activation)
    wide = arithmetic_dtype(q)
    if gain is None and activation == "exp" and not stays_in_range(q.shape[2], pool.shape[1], slope, wide):
        gain = q.new_ones(q.shape[:2], dtype=wide)
    if gain is None or activation != "exp" or norm == "none":
        return torch.ops.causalrn.relation_quadratic_step(q, pool, lengths, gain, *settings), None
    return torch.ops.causalrn.relation_quadratic_step_shifted(q, pool, lengths, gain, *settings)


def convert(
    q: Tensor,
    pool: Tensor,
    lengths: Tensor,
    gain: Tensor | None,
    window: Tensor | None,
    slope: Tensor | None,
    eps: float,
    norm: Norm,
    activation: Activation,
) -> tuple[Any, ...]:
    """The operators' arguments, checked and in their dtypes."""
    shape = (pool.shape[0], *pool.shape[2:])
    if pool.dim() != 4 or q.shape != shape or lengths.shape != shape[:1]:
        raise ValueError(
            f"relation_quadratic_step: got q {tuple(q.shape)}, pool {tuple(pool.shape)} and lengths "
            f"{tuple(lengths.shape)}, wanted (B, H, D), (B, S, H, D) and (B,)"
        )
    check_choices("relation_quadratic_step", eps, norm, activation)
    wanted = {"gain": (gain, (*shape[:2],)), "window": (window, (shape[1],)), "slope": (slope, (shape[1],))}
    for name, (tensor, size) in wanted.items():
        if tensor is not None and tensor.shape != size:
            raise ValueError(f"relation_quadratic_step: got {name} {tuple(tensor.shape)}, wanted {size}")
    wide = arithmetic_dtype(q)
    gain, slope = (None if x is None else x.to(wide) for x in (gain, slope))
    window = None if window is None else window.to(torch.int32)
    return q, pool, lengths.to(torch.int64), gain, window, slope, eps, norm, activation


SETTINGS = (
    "Tensor q, Tensor pool, Tensor lengths, Tensor? gain, Tensor? window, Tensor? slope, float eps, str norm, "
    "str activation"
)


@torch.library.custom_op(
    "causalrn::relation_quadratic_step", mutates_args=(), device_types="cpu", schema=f"({SETTINGS}) -> Tensor"
)
def step_op(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> Tensor:
    return run_cpu(q, pool, lengths, *settings)


def run_cpu(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any, **shift: Tensor) -> Tensor:
    # On the CPU a look costs nothing, and the kernel would read beyond the pool.
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= pool.shape[1]:
        raise ValueError(
            f"relation_quadratic_step: got lengths {int(lengths.min())} to {int(lengths.max())}, wanted 1 to "
            f"{pool.shape[1]}, the positions of the pool"
        )
    check_values("relation_quadratic_step", *settings[1:3])
    native = q.numel() > 0 and quadratic_step_native.available(q, pool)
    return (quadratic_step_native.forward if native else blocked)(q, pool, lengths, *settings, **shift)


@step_op.register_kernel("cuda")
def step_op_cuda(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> Tensor:
    return run_cuda(q, pool, lengths, *settings)


def run_cuda(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any, **shift: Tensor) -> Tensor:
    wide = torch.float64 in (q.dtype, pool.dtype)
    if q.numel() == 0 or wide or q.shape[2] > MAX_TRITON_CHANNELS or find_spec("triton") is None:
        return blocked(q, pool, lengths, *settings, **shift)
    # Importing the package must not need Triton.
    from causalrn.ops import quadratic_step_triton

    return quadratic_step_triton.forward(q, pool, lengths, *settings, **shift)


@step_op.register_fake
def step_op_fake(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "causalrn::relation_quadratic_step_shifted",
    mutates_args=(),
    device_types="cpu",
    schema=f"({SETTINGS}) -> (Tensor out, Tensor shift)",
)
def shifted_op(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    shift = q.new_zeros(q.shape, dtype=arithmetic_dtype(q))
    return run_cpu(q, pool, lengths, *settings, shift=shift), shift


@shifted_op.register_kernel("cuda")
def shifted_op_cuda(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    shift = q.new_zeros(q.shape, dtype=arithmetic_dtype(q))
    return run_cuda(q, pool, lengths, *settings, shift=shift), shift


@shifted_op.register_fake
def shifted_op_fake(q: Tensor, pool: Tensor, lengths: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape, dtype=arithmetic_dtype(q))


def blocked(
    q: Tensor,
    pool: Tensor,
    lengths: Tensor,
    gain: Tensor | None,
    window: Tensor | None,
    slope: Tensor | None,
    eps: float,
    norm: Norm,
    activation: Activation,
    shift: Tensor | None = None,
) -> Tensor:
    """The operator in plain PyTorch, a block of positions at a time: any device and dtype.

    Of rows beyond the range, `shift` (zeros) is filled in.
    """
    batch, positions, heads, channels = pool.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    query = q.to(wide)[:, None]
    total = torch.zeros_like(query[:, 0])
    block = max(1, BLOCK_ELEMENTS // max(1, batch * heads * channels))
    count = lengths[:, None] if window is None else torch.minimum(lengths[:, None], window)
    beyond = None
    if shift is not None and gain is not None:
        beyond = beyond_range(gain, count, channels, slope, shift.dtype)[..., None]
        # Below every exponent.
        shift.masked_fill_(beyond, -math.inf)
        beyond = beyond if beyond.any() else None
    for start in range(0, positions, block):
        z = normalise(query + pool[:, start : start + block].to(wide), norm, eps)
        if gain is not None:
            z = z * gain.to(wide)[:, None, :, None]
        # (B, block, 1): how far each position lies before the receiving one.
        distance = lengths[:, None] - 1 - torch.arange(start, start + z.shape[1], device=q.device)
        distance = distance[:, :, None]
        reached = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        if beyond is not None and shift is not None:
            exponents = z if slope is None else z - slope.to(wide)[:, None] * distance[..., None]
            exponents = exponents.masked_fill(~reached[..., None], -math.inf)
            largest = torch.where(beyond, torch.maximum(shift, exponents.amax(1)), shift)
            # Before the first position in reach everything is exp(-inf) = 0.
            base = largest.masked_fill(largest == -math.inf, 0)
            total = total * torch.exp(shift - base) + torch.exp(exponents - base[:, None]).sum(1)
            shift.copy_(largest)
            continue
        pairs = ACTIVATIONS[activation](z).masked_fill(~reached[..., None], 0)
        if slope is not None:
            # Beyond a row's length the weight would grow without bound, and inf times 0 is NaN.
            pairs = pairs * torch.exp(-slope.to(wide) * distance.clamp(min=0))[..., None]
        total = total + pairs.sum(1)
    return (total / count[..., None]).to(q.dtype)
