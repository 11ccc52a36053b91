"""The quadratic relation as one PyTorch operator, which the dispatcher sends to the best kernel of each device."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causalrn.ops.dispatch import Kernels, arithmetic_dtype, define
from causalrn.ops.pairs import SCHEMA, PairRule, PairTerms, check_values, convert_terms, from_schema
from causalrn.ops.quadratic import cpu, eager
from causalrn.ops.quadratic.exponents import plan_shift

KERNELS = Kernels(cpu, "causalrn.ops.quadratic.gpu", eager)


def relation_quadratic(
    q: Float[Tensor, "B Tq H D"], k: Float[Tensor, "B Tk H D"], terms: PairTerms, rule: PairRule
) -> Float[Tensor, "B Tq H D"]:
    """Quadratic relation in O(T*D) memory: the mean over the reachable positions j of act(gain_ih norm(q_i + k_j)).

        out_ih = 1/n_ih * sum_{j reachable from i} exp(-slope_h |i - j|) act(gain_ih norm(q_ih + k_jh))

    Defined by `relation_quadratic_reference` (official `bar_quadratic_causal_preact`). Sums, norms and exponentials
    are taken in float32 (float64 for float64 inputs) whatever the dtype of q and k; on a CPU the result is the same
    in every run with the same number of threads. Where q_i + k_j is constant, the gradient of the norm is that of
    x / eps.

    Args:
        q: receiving positions: the last Tq of the Tk positions.
        k: contributing positions; q and k of different dtypes are promoted.
        terms: the tensors that enter a pair's weight.
        rule: how a pair becomes a summand.

    Returns:
        The mean over the reachable positions, in the dtype of q (promoted with k): infinite where it is no float, as
        exponentials of |gain| sqrt(D) > 88 may be. `relation_quadratic_shifted` has no such bound.

    Raises:
        ValueError: shapes that do not belong together, an unknown norm or activation, eps < 0, a window < 1, a slope < 0
            or to be trained.
    """
    q, k, terms = convert(q, k, terms, rule)
    return torch.ops.causalrn.relation_quadratic(q, k, *terms, *rule, False)[0]


def relation_quadratic_shifted(
    q: Float[Tensor, "B Tq H D"], k: Float[Tensor, "B Tk H D"], terms: PairTerms, rule: PairRule
) -> tuple[Float[Tensor, "B Tq H D"], Float[Tensor, "B Tq H D"] | None]:
    """As `relation_quadratic`, for exponents of any size: `out` and `shift`, of which the mean is out exp(shift).

    A row whose exponents might leave the range of its dtype, |gain| sqrt(D) + log(number of pairs) > 86 in float32 (70
    with slopes), is summed as exp(gain z - slope |i - j| - shift), where each channel's shift is its largest exponent. The
    shift of all other rows is 0, and they are what `relation_quadratic` gives.

    Returns:
        The mean relative to the shift; and the shift in float32 (float64 for float64), or None where every row is known
        to need none: without a gain unless D is above 4,000, with norm "none" and with other activations, which have no
        bound to go by. The shift counts as a constant: gradients are right for what does not depend on it, such as
        log(out) + shift.

    Raises:
        ValueError: as `relation_quadratic`.
    """
    q, k, terms = convert(q, k, terms, rule)
    terms, shifted = plan_shift(q, k.shape[1], terms, rule)
    out, shift = torch.ops.causalrn.relation_quadratic(q, k, *terms, *rule, shifted)
    return out, shift if shifted else None


def convert(q: Tensor, k: Tensor, terms: PairTerms, rule: PairRule) -> tuple[Tensor, Tensor, PairTerms]:
    """The operator's arguments, checked and in their dtypes."""
    shapes = f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"relation_quadratic: {shapes}, wanted (B, Tq, H, D) and (B, Tk, H, D)")
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"relation_quadratic: {shapes}, wanted at most as many queries as keys")
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k = q.to(dtype), k.to(dtype)
    rows = (q.shape[1], q.shape[2])
    return q, k, convert_terms("relation_quadratic", terms, rule, rows, arithmetic_dtype(q))


def run_forward(kernels: Any, q: Tensor, k: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    """The value and the shift, which is empty unless it is asked for."""
    *flat, shifted = settings
    check_values("relation_quadratic", PairTerms(*settings[:3]))
    shift = q.new_zeros(q.shape if shifted else (0,), dtype=arithmetic_dtype(q))
    return kernels.forward(q, k, *from_schema(*flat), shift if shifted else None), shift


def run_backward(
    kernels: Any, grad: Tensor, q: Tensor, k: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, with an empty tensor for that of a gain which is not there."""
    *flat, shift = settings
    dq, dk, dgain = kernels.backward(grad, q, k, *from_schema(*flat), shift)
    return dq, dk, q.new_empty(0) if dgain is None else dgain


def forward_fake(q: Tensor, k: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape if settings[-1] else (0,), dtype=arithmetic_dtype(q))


def backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, gain: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dgain = q.new_empty(0) if gain is None else gain.new_empty(gain.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), dgain


forward_op = define(
    "relation_quadratic",
    f"(Tensor q, Tensor k, {SCHEMA}, bool shifted) -> (Tensor out, Tensor shift)",
    **KERNELS.on_devices(run_forward),
    fake=forward_fake,
)
backward_op = define(
    "relation_quadratic_backward",
    f"(Tensor grad, Tensor q, Tensor k, {SCHEMA}, Tensor? shift) -> (Tensor dq, Tensor dk, Tensor dgain)",
    **KERNELS.on_devices(run_backward, by=1),
    fake=backward_fake,
)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, *settings, shifted = inputs
    terms, ctx.rule = from_schema(*settings)
    shift = output[1]
    ctx.save_for_backward(q, k, *terms, shift if shifted else None)
    ctx.mark_non_differentiable(shift)


def differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, gain, window, slope, shift = ctx.saved_tensors
    dq, dk, dgain = torch.ops.causalrn.relation_quadratic_backward(
        grad, q, k, gain, window, slope, *ctx.rule, shift
    )
    return dq, dk, None if gain is None else dgain, *(None,) * 7


forward_op.register_autograd(differentiate, setup_context=save_inputs)
