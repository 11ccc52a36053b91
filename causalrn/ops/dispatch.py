"""Defines the PyTorch operators: the dispatcher sends each call to the kernel of its tensors' device."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage]

# The dtypes that the Triton kernels read and write tensors in.
TRITON_DTYPES = (torch.float32, torch.bfloat16)


def define(
    name: str, schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> CustomOpDef:
    """Registers the operator `causalrn::name`, which has a kernel for each kind of device.

    Args:
        schema: arguments and results. They are flat: no types of ours.
        fake: gives results of the right shapes and dtypes without computing them.
    """
    operator = torch.library.custom_op(
        f"causalrn::{name}", cpu, mutates_args=(), device_types="cpu", schema=schema
    )
    operator.register_kernel("cuda", cuda)
    operator.register_fake(fake)
    return operator


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, norms and exponentials: float64 for float64, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def triton_serves(x: Tensor) -> bool:
    """Whether Triton is there and its kernels take this tensor. Importing the package must not need Triton."""
    return x.dtype in TRITON_DTYPES and x.numel() > 0 and has_triton()
