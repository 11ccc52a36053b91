"""What every operator asks before it runs: in which dtype to compute, and whether Triton's kernels take a tensor."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# The dtypes that the Triton kernels read and write tensors in.
TRITON_DTYPES = (torch.float32, torch.bfloat16)


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, norms and exponentials: float64 for float64, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def triton_serves(x: Tensor) -> bool:
    """Whether Triton is there and its kernels take tensors of this dtype. Importing the package must not need Triton."""
    return x.dtype in TRITON_DTYPES and has_triton()
