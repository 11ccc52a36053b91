"""Helpers of the Triton kernels of both relations: the device to launch on, and a few constants."""

import os
from contextlib import AbstractContextManager

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = tl.constexpr(1.4426950408889634)


def ceil_div(size: int, divisor: int) -> int:
    return -(-size // divisor)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(tensor)
