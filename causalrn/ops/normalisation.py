"""Plain layer and RMS normalisation as one operator: one pass over memory forward, one backward."""

import ctypes
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from causalrn.ops import native
from causalrn.ops.dispatch import arithmetic_dtype, define
from causalrn.ops.pairs import Norm

# Elements below which starting another thread costs more than it saves.
ELEMENTS_PER_THREAD = 2**15


class Arguments(ctypes.Structure):
    """`NormaliseArguments` of csrc/normalise.cpp."""

    _fields_ = native.fields(
        pointers="x grad out spread", int64="rows channels", float32="eps", int32="centre bf16"
    )


def normalise(x: Float[Tensor, "*shape D"], norm: Norm, eps: float) -> Float[Tensor, "*shape D"]:
    """Plain normalisation over the last axis: no affine part, eps added to the standard deviation.

    Defined by `causalrn.ops.reference.normalise` (official `plain_layer_norm`, `plain_rms_norm`). Statistics are
    taken in float32 (float64 for float64). The gradient of a row without spread is that of x / eps.

    Args:
        x: rows of D channels.
        norm: "layer", "rms" or "none", which returns x.
        eps: added to the standard deviation, in the units of x.

    Raises:
        ValueError: an unknown norm, or eps < 0.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"normalise: got norm {norm!r}, wanted one of {get_args(Norm)}")
    if not eps >= 0:
        raise ValueError(f"normalise: got eps {eps}, wanted a number >= 0")
    if norm == "none":
        return x
    return torch.ops.causalrn.normalise(x, norm, eps)[0]


def eager(
    x: Float[Tensor, "*shape D"], norm: str, eps: float
) -> tuple[Float[Tensor, "*shape D"], Float[Tensor, "*shape"]]:
    """The normalised rows in plain PyTorch, and their standard deviations (root mean squares), which "none" takes for 0."""
    wide = x.to(arithmetic_dtype(x))
    if norm == "none":
        return x, wide.new_zeros(x.shape[:-1])
    centred = wide - wide.mean(-1, keepdim=True) if norm == "layer" else wide
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    return (centred / (spread + eps)).to(x.dtype), spread[..., 0]


def eager_backward(
    grad: Float[Tensor, "*shape D"],
    y: Float[Tensor, "*shape D"],
    spread: Float[Tensor, "*shape"],
    norm: str,
    eps: float,
) -> Float[Tensor, "*shape D"]:
    """The gradient with respect to x, from what `eager` has given."""
    if norm == "none":
        return grad
    g, y_wide, s = grad.to(arithmetic_dtype(grad)), y.to(arithmetic_dtype(y)), spread[..., None]
    along = (g * y_wide).mean(-1, keepdim=True) * ((s + eps) / s)
    # A row without spread is 0 / eps, whatever the direction in which it changes.
    across = g - torch.where(s > 0, y_wide * along, 0)
    if norm == "layer":
        across = across - g.mean(-1, keepdim=True)
    return (across / (s + eps)).to(grad.dtype)


def forward_on_cpu(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    if not native.serves(x):
        return eager(x, norm, eps)
    spread = torch.empty(x.shape[:-1], dtype=torch.float32)
    return call("normalise_forward", x.contiguous(), spread, norm, eps), spread


def backward_on_cpu(grad: Tensor, y: Tensor, spread: Tensor, norm: str, eps: float) -> Tensor:
    if not native.serves(y):
        return eager_backward(grad, y, spread, norm, eps)
    return call("normalise_backward", y.contiguous(), spread.contiguous(), norm, eps, grad.contiguous())


def call(kernel: str, x: Tensor, spread: Tensor, norm: str, eps: float, grad: Tensor | None = None) -> Tensor:
    """Runs a kernel on contiguous tensors, and gives what it writes."""
    out = torch.empty_like(x)
    native.call(
        kernel,
        Arguments,
        {"x": x, "grad": grad, "out": out, "spread": spread},
        rows=spread.numel(),
        channels=x.shape[-1],
        eps=eps,
        centre=norm == "layer",
        bf16=x.dtype is torch.bfloat16,
        threads=native.threads_for(x.numel(), ELEMENTS_PER_THREAD),
    )
    return out


def save_result(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # y is kept anyway by the projection that follows; x would be a second copy of the stream.
    ctx.save_for_backward(*output)
    ctx.settings = inputs[1:]
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    return torch.ops.causalrn.normalise_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None


forward_op = define(
    "normalise",
    "(Tensor x, str norm, float eps) -> (Tensor y, Tensor spread)",
    cpu=forward_on_cpu,
    cuda=eager,
    fake=lambda x, *rule: (x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=arithmetic_dtype(x))),
)
backward_op = define(
    "normalise_backward",
    "(Tensor grad, Tensor y, Tensor spread, str norm, float eps) -> Tensor",
    cpu=backward_on_cpu,
    cuda=eager_backward,
    fake=lambda grad, y, *rest: y.new_empty(y.shape),
)
forward_op.register_autograd(differentiate, setup_context=save_result)
