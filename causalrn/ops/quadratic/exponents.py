"""Finds the rows of the quadratic relation whose exponentials leave the range of their dtype and need a shift."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causalrn.ops.dispatch import arithmetic_dtype
from causalrn.ops.pairs import PairRule, PairTerms

# Bounds of |gain_i norm(q_i + k_j)| + log(number of pairs): float32 holds exp(-87.3) to exp(88.7), float64 10 times that.
RANGES = {torch.float32: 86.0, torch.float64: 700.0}
# With slopes the range is smaller: a weight below exp(-87.3) becomes 0, and its pair's exponent must not make up for that.
SLOPED_RANGES = {torch.float32: 70.0, torch.float64: 600.0}


def exponent_range(slope: Tensor | None, dtype: torch.dtype = torch.float32) -> float:
    """The largest bound of a row that needs no shift, in this dtype of the arithmetic."""
    return (RANGES if slope is None else SLOPED_RANGES)[dtype]


def plan_shift(
    q: Float[Tensor, "*rows D"], n_keys: int, terms: PairTerms, rule: PairRule
) -> tuple[PairTerms, bool]:
    """The terms, and whether rows may need a shift: then the terms have a gain, as rows are chosen by it.

    Without a gain a row needs one where sqrt(D) alone is too much. Without a norm there is no bound to go by, and other
    activations than exp do not leave the range.
    """
    if rule.activation != "exp" or rule.norm == "none":
        return terms, False
    dtype = arithmetic_dtype(q)
    if terms.gain is None:
        if math.sqrt(q.shape[-1]) + math.log(max(1, n_keys)) <= exponent_range(terms.slope, dtype):
            return terms, False
        terms = terms._replace(gain=q.new_ones(q.shape[-3:-1], dtype=dtype))
    return terms, True


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
