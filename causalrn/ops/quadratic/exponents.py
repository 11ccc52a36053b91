"""Which rows of the quadratic relation have exponentials beyond the range of their dtype, and are shifted into it."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Bounds of |gain_i norm(q_i + k_j)| + log(number of pairs): float32 holds exp(-87.3) to exp(88.7), float64 10 times that.
RANGES = {torch.float32: 86.0, torch.float64: 700.0}
# With slopes: the weight of a distant pair, below exp(-87.3), is 0; the rest of its exponent must not have made up for that.
SLOPED_RANGES = {torch.float32: 70.0, torch.float64: 600.0}


def exponent_range(slope: Tensor | None, dtype: torch.dtype = torch.float32) -> float:
    """The largest bound of a row that needs no shift, in this dtype of the arithmetic."""
    return (RANGES if slope is None else SLOPED_RANGES)[dtype]


def stays_in_range(channels: int, n_keys: int, slope: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether no row without a gain needs a shift."""
    return math.sqrt(channels) + math.log(max(1, n_keys)) <= exponent_range(slope, dtype)


def beyond_range(
    gain: Float[Tensor, "*rows H"],
    count: Tensor,
    channels: int,
    slope: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Bool[Tensor, "*rows H"]:
    """Whether each row needs a shift, by |norm(x)| <= sqrt(D) and the number of its pairs.

    Args:
        count: pairs of each row, at least 1; of a shape that broadcasts with the gain's.
    """
    return gain.abs() * math.sqrt(channels) + count.to(gain.dtype).log() > exponent_range(slope, dtype)
