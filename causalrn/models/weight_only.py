"""Networks whose linear layers hold their weights in bfloat16 or int8, for decoding where memory is small or slow."""

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalrn.ops.weight_only import WEIGHT_DTYPES, stored_linear

Network = TypeVar("Network", bound=nn.Module)


class StoredLinear(nn.Module):
    """A linear layer for inference whose weight is held in fewer bits than it computes with.

    int8 keeps each output's weights as whole multiples of their largest magnitude / 127.

    Args:
        linear: the layer to take the weights of; float32 weights are shared with it.
        dtype: float32, bfloat16 or int8.

    Raises:
        ValueError: another dtype.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(f"weights can be held in one of {WEIGHT_DTYPES}: got {dtype}")
        weight, scale = linear.weight.detach(), None
        if dtype is torch.int8:
            # A row of zeros has no magnitude to divide by.
            scale = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
            weight = (weight / scale[:, None]).round()
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Float[Tensor, "*shape I"]) -> Float[Tensor, "*shape O"]:
        return stored_linear(x, self.weight, self.scale, self.bias)


def store_weights(network: Network, dtype: torch.dtype) -> Network:
    """Replaces every linear layer by a `StoredLinear`, in place; embeddings and what grows with the length stay.

    The network can then no longer be trained, and decodes at the speed of reading the stored weights: float32 too is
    faster than PyTorch's own product, which is made for more rows.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, StoredLinear(child, dtype))
    return network.eval()
