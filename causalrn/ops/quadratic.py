"""The quadratic relation as one PyTorch operator, which the dispatcher sends to the best kernel of each device."""

from importlib.util import find_spec
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.ops import quadratic_native, tiled
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
        window: position i reaches |i - j| < window_h only; everything if None.
        slope: the weight of a pair falls as exp(-slope_h |i - j|), not differentiable; 0 if None.

    Returns:
        The mean over the reachable positions, in the dtype of q (promoted with k).

    Raises:
        ValueError: shapes that do not belong together, an unknown norm or activation, eps < 0, a slope to be trained.
    """
    check_arguments(q, k, eps, norm, activation, gain, window, slope)
    dtype = torch.promote_types(q.dtype, k.dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return torch.ops.causalrn.relation_quadratic(
        q.to(dtype),
        k.to(dtype),
        None if gain is None else gain.to(wide),
        None if window is None else window.to(torch.int32),
        None if slope is None else slope.to(wide),
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
    if norm not in get_args(Norm):
        raise ValueError(f"relation_quadratic: got norm {norm!r}, wanted one of {get_args(Norm)}")
    if activation not in get_args(Activation):
        raise ValueError(
            f"relation_quadratic: got activation {activation!r}, wanted one of {get_args(Activation)}"
        )
    if eps < 0:
        raise ValueError(f"relation_quadratic: got eps {eps}, wanted a number >= 0")
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


def cpu_kernels(q: Tensor) -> Any:
    """The module whose `forward` and `backward` serve this CPU tensor."""
    return quadratic_native if quadratic_native.available(q) else tiled


def cuda_kernels(q: Tensor) -> Any:
    """The module whose `forward` and `backward` serve this CUDA tensor."""
    if q.dtype not in TRITON_DTYPES or find_spec("triton") is None:
        return tiled
    # Importing the package must not need Triton.
    from causalrn.ops import quadratic_triton

    return quadratic_triton


@torch.library.custom_op(
    "causalrn::relation_quadratic",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor k, {SETTINGS}) -> Tensor",
)
def forward_op(q: Tensor, k: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(q) if q.numel() == 0 else cpu_kernels(q).forward(q, k, *settings)


@forward_op.register_kernel("cuda")
def forward_op_cuda(q: Tensor, k: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(q) if q.numel() == 0 else cuda_kernels(q).forward(q, k, *settings)


@forward_op.register_fake
def forward_op_fake(q: Tensor, k: Tensor, *settings: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op(
    "causalrn::relation_quadratic_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, Tensor q, Tensor k, {SETTINGS}) -> (Tensor dq, Tensor dk, Tensor dgain)",
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


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, eps, causal, norm, activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (eps, causal, norm, activation)


def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, gain, window, slope = ctx.saved_tensors
    dq, dk, dgain = torch.ops.causalrn.relation_quadratic_backward(
        grad, q, k, gain, window, slope, *ctx.settings
    )
    return dq, dk, None if gain is None else dgain, *(None,) * 6


forward_op.register_autograd(differentiate, setup_context=save_inputs)
