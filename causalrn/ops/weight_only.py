"""A linear layer whose weights are held in fewer bits than it computes with, as one PyTorch operator."""

import ctypes

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from causalrn.ops import native
from causalrn.ops.dispatch import define

# In the order of WeightType in csrc/stored_linear.cpp.
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
# Rows above which PyTorch's matrix product, for which the weights are widened first, is the faster one.
MAX_ROWS = 8
# Bytes of weights below which another thread costs more than it saves.
BYTES_PER_THREAD = 2**16


class Arguments(ctypes.Structure):
    """`StoredLinearArguments` of csrc/stored_linear.cpp."""

    _fields_ = native.fields(pointers="x weight scale bias y", int64="rows inputs outputs", int32="type")


def stored_linear(
    x: Float[Tensor, "*shape I"],
    weight: Shaped[Tensor, "O I"],
    scale: Float[Tensor, " O"] | None = None,
    bias: Float[Tensor, " O"] | None = None,
) -> Float[Tensor, "*shape O"]:
    """x @ (scale * weight)^T + bias in the dtype of x, reading each stored weight once. Not differentiable.

    Args:
        x: input.
        weight: in float32, bfloat16 or int8.
        scale: factor on each of the weight's rows; 1 if None.
        bias: added if given.

    Raises:
        ValueError: shapes that do not belong together, or a weight of another dtype.
    """
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"stored_linear: got a weight of {weight.dtype}, wanted one of {WEIGHT_DTYPES}")
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"stored_linear: got x {tuple(x.shape)} and weight {tuple(weight.shape)}, wanted (..., I) and (O, I)"
        )
    outputs = weight.shape[0]
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.shape != (outputs,):
            raise ValueError(f"stored_linear: got {name} {tuple(tensor.shape)}, wanted {(outputs,)}")
    y = torch.ops.causalrn.stored_linear(x.reshape(-1, x.shape[-1]), weight, scale, bias)
    return y.view(*x.shape[:-1], outputs)


def stored_linear_on_cpu(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    if x.dtype is not torch.float32 or not 0 < rows <= MAX_ROWS or not native.serves(x):
        return eager(x, weight, scale, bias)
    x, weight, y = x.contiguous(), weight.contiguous(), x.new_empty(rows, outputs)
    native.call(
        "stored_linear",
        Arguments,
        {"x": x, "weight": weight, "scale": scale, "bias": bias, "y": y},
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        type=WEIGHT_DTYPES.index(weight.dtype),
        threads=native.threads_for(weight.nbytes, BYTES_PER_THREAD),
    )
    return y


def eager(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """The operator in plain PyTorch."""
    wide = weight.to(x.dtype)
    if scale is not None:
        wide = wide * scale[:, None].to(x.dtype)
    return F.linear(x, wide, None if bias is None else bias.to(x.dtype))


stored_linear_op = define(
    "stored_linear",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor",
    cpu=stored_linear_on_cpu,
    cuda=eager,
    fake=lambda x, weight, *rest: x.new_empty(len(x), len(weight)),
)
