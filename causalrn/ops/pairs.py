"""Settings of the quadratic relation's pairs (i, j): two small types that every layer passes on as they are."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Norm = Literal["layer", "rms", "none"]
Activation = Literal["exp", "relu", "elu", "gelu"]


class PairTerms(NamedTuple):
    """The tensors that enter a pair's weight; each may be left out.

    Attributes:
        gain: factor on the normalised pair, per receiving position and head: (Tq, H), or (B, H) in a decoding step. It is
            differentiable; None stands for 1.
        window: position i reaches |i - j| < window_h only, 1 or more; None stands for no limit. A row that reaches nothing
            is refused on a CPU and NaN on a GPU, where a look at the window would wait for the device.
        slope: the weight of a pair falls as exp(-slope_h |i - j|), 0 or more, not differentiable; None stands for 0.
    """

    gain: Float[Tensor, "rows H"] | None = None
    window: Int[Tensor, " H"] | None = None
    slope: Float[Tensor, " H"] | None = None


class PairRule(NamedTuple):
    """How a pair q_i + k_j becomes a summand.

    Attributes:
        eps: added to the standard deviation of q_i + k_j, in its units.
        causal: position i reaches j <= i only. A decoding step takes the last position, to which it makes no difference.
        norm: "layer" (centred), "rms" or "none", over the D channels of a head, without affine part.
        activation: applied to each normalised pair.
    """

    eps: float
    causal: bool = True
    norm: Norm = "layer"
    activation: Activation = "exp"


# The fields of both types in their order: an operator's schema can name flat arguments only.
SCHEMA = "Tensor? gain, Tensor? window, Tensor? slope, float eps, bool causal, str norm, str activation"


def from_schema(*settings: Any) -> tuple[PairTerms, PairRule]:
    """The inverse of `(*terms, *rule)`."""
    return PairTerms(*settings[:3]), PairRule(*settings[3:])


def convert_terms(
    operator: str, terms: PairTerms, rule: PairRule, rows: tuple[int, int], dtype: torch.dtype
) -> PairTerms:
    """The terms in the dtypes of the kernels.

    Args:
        operator: named in errors.
        rows: the shape that a gain must have.
        dtype: of the arithmetic.

    Raises:
        ValueError: shapes that do not belong together, an unknown norm or activation, eps < 0, a slope to be trained.
    """
    for name, choices in (("norm", Norm), ("activation", Activation)):
        if (value := getattr(rule, name)) not in get_args(choices):
            raise ValueError(f"{operator}: got {name} {value!r}, wanted one of {get_args(choices)}")
    if not rule.eps >= 0:
        raise ValueError(f"{operator}: got eps {rule.eps}, wanted a number >= 0")
    for name, tensor, shape in zip(terms._fields, terms, (rows, rows[1:], rows[1:]), strict=True):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{operator}: got {name} {tuple(tensor.shape)}, wanted {tuple(shape)}")
    gain, window, slope = terms
    if slope is not None and slope.requires_grad:
        raise ValueError(f"{operator}: got a slope that requires a gradient, wanted a constant one")
    gain, slope = (None if x is None else x.to(dtype) for x in (gain, slope))
    return PairTerms(gain, None if window is None else window.to(torch.int32), slope)


def check_values(operator: str, terms: PairTerms) -> None:
    """Refuses a window < 1 and a slope < 0 on a CPU, where a look costs nothing; a GPU would have to be waited for."""
    _, window, slope = (x if x is not None and x.device.type == "cpu" and x.numel() else None for x in terms)
    if window is not None and not window.min() >= 1:
        raise ValueError(f"{operator}: got window {window.tolist()}, wanted 1 or more positions")
    # Not `< 0`: a NaN is refused, too.
    if slope is not None and not slope.min() >= 0:
        raise ValueError(f"{operator}: got slope {slope.tolist()}, wanted numbers >= 0")
