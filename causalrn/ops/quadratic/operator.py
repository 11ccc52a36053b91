"""The quadratic relation as one PyTorch operator, which the dispatcher sends to the best kernel of each device."""

from importlib.util import find_spec
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.ops.quadratic import cpu as quadratic_native
from causalrn.ops.quadratic import eager as tiled
from causalrn.ops.quadratic.exponents import stays_in_range
from causalrn.ops.reference import Activation, Norm

SETTINGS = "Tensor? gain, Tensor? window, Tensor? slope, float eps, bool causal, str norm, str activation"
# The dtypes of the Triton kernels.
TRITON_DTYPES = (torch.float32, torch.bfloat16)


def relation_quadratic(
    q: Float[Tensor, "B Tq H D"],
    k: Float[Tensor, "B Tk H D"],
    *,
    eps: float,
    causal: bool = True,
    norm: Norm = "layer",
    activation: Activation = "exp",
    gain: Float[Tensor, "Tq H"] | None = None,
    window: Int[Tensor, " H"] | None = None,
    slope: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B Tq H D"]:
    """Quadratic relation in O(T*D) memory: the mean over the reachable positions j of act(gain_ih norm(q_i + k_j)).

        out_ih = 1/n_ih * sum_{j reachable from i} exp(-slope_h |i - j|) act(gain_ih norm(q_ih + k_jh))

    Defined by `relation_quadratic_reference` (official `bar_quadratic_causal_preact`). Sums, norms and exponentials
    are taken in float32 (float64 for float64 inputs) whatever the dtype of q and k; on a CPU the result is the same
    in every run with the same number of threads. Where q_i + k_j is constant, the
    gradient of the norm is that of x / eps.

    Args:
        q: receiving positions: the last Tq of the Tk positions.
        k: contributing positions; q and k of different dtypes are promoted.
        eps: added to the standard deviation of q_i + k_j, in its units.
        causal: position i reaches j <= i only.
        norm: "layer" (centred), "rms" or "none", over the D channels of a head, without affine part.
        activation: applied to each normalised pair.
        gain: factor on the normalised pair, differentiable; 1 if None.
        window: position i reaches |i - j| < window_h only, 1 or more; everything if None. A row that reaches nothing is
            refused on a CPU and NaN on a GPU, where a look at the window would wait for the device.
        slope: the weight of a pair falls as exp(-slope_h |i - j|), 0 or more, not differentiable; 0 if None.

    Returns:
        The mean over the reachable positions, in the dtype of q (promoted with k): infinite where it is no float, as
        exponentials of |gain| sqrt(D) > 88 may be. `relation_quadratic_shifted` has no such bound.

    Raises:
        ValueError: shapes that do not belong together, an unknown norm or activation, eps < 0, a window < 1, a slope < 0
            or to be trained.
    """
    arguments = convert(q, k, gain, window, slope, eps, causal, norm, activation)
    return torch.ops.causalrn.relation_quadratic(*arguments)


def relation_quadratic_shifted(
    q: Float[Tensor, "B Tq H D"],
    k: Float[Tensor, "B Tk H D"],
    *,
    eps: float,
    causal: bool = True,
    norm: Norm = "layer",
    activation: Activation = "exp",
    gain: Float[Tensor, "Tq H"] | None = None,
    window: Int[Tensor, " H"] | None = None,
    slope: Float[Tensor, " H"] | None = None,
) -> tuple[Float[Tensor, "B Tq H D"], Float[Tensor, "B Tq H D"] | None]:
    """As `relation_quadratic`, for exponents of any size: `out` and `shift`, of which the mean is out exp(shift).

    A row whose exponents might leave the range of its dtype, |gain| sqrt(D) + log(number of pairs) > 86 in float32 (70
    with slopes), is summed as exp(gain z - slope |i - j| - shift), where each channel's shift is its largest exponent. The
    shift of all other rows is 0, and they are what `relation_quadratic` gives.

    Returns:
        The mean relative to the shift; and the shift in float32 (float64 for float64), or None where every row is known
        to need none: without a gain unless D is above 4,000, with norm "none" and with other activations, which have no
        bound to go by. The shift counts as a constant: gradients are right for what does not depend on it, such as
        log(out) + shift.

    Raises:
        ValueError: as `relation_quadratic`.
    """
    q, k, gain, *settings = convert(q, k, gain, window, slope, eps, causal, norm, activation)
    wide = arithmetic_dtype(q)
    if gain is None and activation == "exp" and not stays_in_range(q.shape[3], k.shape[1], slope, wide):
        gain = q.new_ones(q.shape[1:3], dtype=wide)
    if gain is None or activation != "exp" or norm == "none":
        return torch.ops.causalrn.relation_quadratic(q, k, gain, *settings), None
    out, shift = torch.ops.causalrn.relation_quadratic_shifted(q, k, gain, *settings)
    return out, shift


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def convert(
    q: Tensor,
    k: Tensor,
    gain: Tensor | None,
    window: Tensor | None,
    slope: Tensor | None,
    eps: float,
    causal: bool,
    norm: Norm,
    activation: Activation,
) -> tuple[Any, ...]:
    """The operators' arguments, checked and in their dtypes."""
    check_arguments(q, k, eps, norm, activation, gain, window, slope)
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k = q.to(dtype), k.to(dtype)
    wide = arithmetic_dtype(q)
    gain, slope = (None if x is None else x.to(wide) for x in (gain, slope))
    return (
        q,
        k,
        gain,
        None if window is None else window.to(torch.int32),
        slope,
        eps,
        causal,
        norm,
        activation,
    )


def check_arguments(
    q: Tensor,
    k: Tensor,
    eps: float,
    norm: str,
    activation: str,
    gain: Tensor | None,
    window: Tensor | None,
    slope: Tensor | None,
) -> None:
    shapes = f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"relation_quadratic: {shapes}, wanted (B, Tq, H, D) and (B, Tk, H, D)")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"relation_quadratic: {shapes}, wanted at most as many queries as keys")
    check_choices("relation_quadratic", eps, norm, activation)
    wanted = {
        "gain": (gain, (q.shape[1], q.shape[2])),
        "window": (window, (q.shape[2],)),
        "slope": (slope, (q.shape[2],)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"relation_quadratic: got {name} {tuple(tensor.shape)}, wanted {shape}")
    if slope is not None and slope.requires_grad:
        raise ValueError("relation_quadratic: got a slope that requires a gradient, wanted a constant one")


def check_choices(operator: str, eps: float, norm: str, activation: str) -> None:
    if norm not in get_args(Norm):
        raise ValueError(f"{operator}: got norm {norm!r}, wanted one of {get_args(Norm)}")
    if activation not in get_args(Activation):
        raise ValueError(f"{operator}: got activation {activation!r}, wanted one of {get_args(Activation)}")
    if not eps >= 0:
        raise ValueError(f"{operator}: got eps {eps}, wanted a number >= 0")


def check_values(operator: str, window: Tensor | None, slope: Tensor | None) -> None:
    """On a CPU, where a look costs nothing; a GPU would have to be waited for."""
    if window is not None and window.numel() and not window.min() >= 1:
        raise ValueError(f"{operator}: got window {window.tolist()}, wanted 1 or more positions")
    # Not `< 0`: a NaN is refused, too.
    if slope is not None and slope.numel() and not slope.min() >= 0:
        raise ValueError(f"{operator}: got slope {slope.tolist()}, wanted numbers >= 0")


def cpu_kernels(q: Tensor) -> Any:
    """The module whose `forward` and `backward` serve this CPU tensor."""
    return quadratic_native if quadratic_native.available(q) else tiled


def cuda_kernels(q: Tensor) -> Any:
    """The module whose `forward` and `backward` serve this CUDA tensor."""
    if q.dtype not in TRITON_DTYPES or find_spec("triton") is None:
        return tiled
    # Importing the package must not need Triton.
    from causalrn.ops.quadratic import gpu as quadratic_triton

    return quadratic_triton


@torch.library.custom_op(
    "causalrn::relation_quadratic",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor k, {SETTINGS}) -> Tensor",
)
def forward_op(q: Tensor, k: Tensor, *settings: Any) -> Tensor:
    check_values("relation_quadratic", *settings[1:3])
    return torch.empty_like(q) if q.numel() == 0 else cpu_kernels(q).forward(q, k, *settings)


@forward_op.register_kernel("cuda")
def forward_op_cuda(q: Tensor, k: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(q) if q.numel() == 0 else cuda_kernels(q).forward(q, k, *settings)


@forward_op.register_fake
def forward_op_fake(q: Tensor, k: Tensor, *settings: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "causalrn::relation_quadratic_shifted",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor k, {SETTINGS}) -> (Tensor out, Tensor shift)",
)
def shifted_op(q: Tensor, k: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    check_values("relation_quadratic", *settings[1:3])
    return run_shifted(cpu_kernels(q), q, k, *settings)


@shifted_op.register_kernel("cuda")
def shifted_op_cuda(q: Tensor, k: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return run_shifted(cuda_kernels(q), q, k, *settings)


def run_shifted(kernels: Any, q: Tensor, k: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    shift = torch.zeros(q.shape, dtype=arithmetic_dtype(q), device=q.device)
    return torch.empty_like(q) if q.numel() == 0 else kernels.forward(q, k, *settings, shift=shift), shift


@shifted_op.register_fake
def shifted_op_fake(q: Tensor, k: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape, dtype=arithmetic_dtype(q))


@torch.library.custom_op(
    "causalrn::relation_quadratic_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, Tensor q, Tensor k, {SETTINGS}, Tensor? shift) -> (Tensor dq, Tensor dk, Tensor dgain)",
)
def backward_op(grad: Tensor, q: Tensor, k: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return run_backward(cpu_kernels(q), grad, q, k, *settings)


@backward_op.register_kernel("cuda")
def backward_op_cuda(grad: Tensor, q: Tensor, k: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return run_backward(cuda_kernels(q), grad, q, k, *settings)


def run_backward(
    kernels: Any, grad: Tensor, q: Tensor, k: Tensor, gain: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, with an empty tensor for that of a gain which is not there."""
    if q.numel() == 0:
        return (
            torch.zeros_like(q),
            torch.zeros_like(k),
            q.new_empty(0) if gain is None else torch.zeros_like(gain),
        )
    dq, dk, dgain = kernels.backward(grad, q, k, gain, *settings)
    return dq, dk, q.new_empty(0) if gain is None else dgain


@backward_op.register_fake
def backward_op_fake(
    grad: Tensor, q: Tensor, k: Tensor, gain: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dgain = q.new_empty(0) if gain is None else gain.new_empty(gain.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), dgain


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    *tensors, eps, causal, norm, activation = inputs
    ctx.settings = (eps, causal, norm, activation)
    shift = None if isinstance(output, Tensor) else output[1]
    ctx.save_for_backward(*tensors, shift)
    if shift is not None:
        ctx.mark_non_differentiable(shift)


def differentiate(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, gain, window, slope, shift = ctx.saved_tensors
    dq, dk, dgain = torch.ops.causalrn.relation_quadratic_backward(
        grad, q, k, gain, window, slope, *ctx.settings, shift
    )
    return dq, dk, None if gain is None else dgain, *(None,) * 6


forward_op.register_autograd(differentiate, setup_context=save_inputs)
shifted_op.register_autograd(differentiate, setup_context=save_inputs)
