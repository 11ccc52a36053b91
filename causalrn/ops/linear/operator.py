"""The linear relation as PyTorch operators, which the dispatcher sends to the best kernel of each device."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from causalrn.ops.context_parallel import active_split, state_elsewhere
from causalrn.ops.dispatch import Kernels, arithmetic_dtype, define
from causalrn.ops.linear import cpu, eager
from causalrn.ops.reference import LinearState

LinearNorm = Literal["layer", "rms"]
KERNELS = Kernels(cpu, "causalrn.ops.linear.gpu", eager)


def relation_linear(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T H D"],
    state: LinearState | None = None,
    *,
    eps: float,
    causal: bool = True,
    norm: LinearNorm = "layer",
) -> tuple[Float[Tensor, "B T H D"], LinearState]:
    """Linear relation, fused: exp(norm(q_i)) * sum_{j<=i} exp(norm(k_j)), normalised over heads and channels.

    Defined by `relation_linear_reference` (official `normalize(bar_linear_causal_stable(normalize(a),
    normalize(b)))`). Between forward and backward it keeps q, k and the passed state, nothing else. Sums, norms and
    exponentials are taken in float32 (float64 for float64 inputs) whatever the dtype of q and k, and sums over
    positions are carried in float64 from block to block. Where a row of q, k or of the result is constant, the
    gradient of its standard deviation counts as 0 (the reference gives NaN).

    Within `context_parallel`, q and k are this rank's part of the sequence; the result is that of the whole sequence.

    Exponents reach sqrt(D - 1) ("rms": sqrt(D)), so sums stay finite up to D of about 5000.

    Args:
        q: receiving positions.
        k: contributing positions, in the dtype of q.
        state: what the positions before these left, from an earlier call; gradients flow into it and out of the
            returned one, so that a sequence taken part by part equals the whole one.
        eps: added to the standard deviations of q and k, and to that of the result relative to its row's maximum.
        causal: position i sees j <= i only; else the whole part (and the state).
        norm: "layer" (centred) or "rms".

    Returns:
        The normalised rows in the dtype of q, and the state after the last position (total in float32).

    Raises:
        ValueError: shapes or dtypes that do not belong together, an unknown norm, eps < 0, a state within
            `context_parallel`.
    """
    check_arguments(q, k, state, eps, norm)
    if (split := active_split()) is not None:
        if state is not None:
            raise ValueError(
                "relation_linear: got a state of a sequence split over ranks, wanted a whole sequence"
            )
        state = state_elsewhere(relation_linear_total(k, eps=eps, norm=norm), q.shape[1], causal, split)
    total = None if state is None else state.total.to(arithmetic_dtype(q))
    y, total = torch.ops.causalrn.relation_linear(q, k, total, eps, causal, norm)
    if state is None:
        count = torch.full(q.shape[:1], q.shape[1], dtype=torch.float32, device=q.device)
    else:
        count = state.count + q.shape[1]
    return y, LinearState(total, count)


def relation_linear_step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B H D"],
    state: LinearState,
    *,
    eps: float,
    norm: LinearNorm = "layer",
) -> tuple[Float[Tensor, "B H D"], LinearState]:
    """One further position after those in `state`: `relation_linear` on a part of length 1, by the same kernels."""
    y, state = relation_linear(q[:, None], k[:, None], state, eps=eps, norm=norm)
    return y[:, 0], state


def relation_linear_total(
    k: Float[Tensor, "B T H D"], *, eps: float, norm: LinearNorm = "layer"
) -> Float[Tensor, "B H D"]:
    """The sum over j of exp(norm(k_j)), which k adds to the state's total: other parts of a split sequence need it.

    Arguments, precision and errors as `relation_linear`.
    """
    check_arguments(k, k, None, eps, norm)
    return torch.ops.causalrn.relation_linear_total(k, eps, norm)


def check_arguments(q: Tensor, k: Tensor, state: LinearState | None, eps: float, norm: str) -> None:
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(
            f"relation_linear: got q {tuple(q.shape)} and k {tuple(k.shape)}, wanted (B, T, H, D) twice"
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"relation_linear: got q {q.dtype} and k {k.dtype}, wanted one floating-point dtype")
    if norm not in get_args(LinearNorm):
        raise ValueError(f"relation_linear: got norm {norm!r}, wanted one of {get_args(LinearNorm)}")
    if not eps >= 0:
        raise ValueError(f"relation_linear: got eps {eps}, wanted a number >= 0")
    if state is not None:
        total, count = (q.shape[0], *q.shape[2:]), q.shape[:1]
        if state.total.shape != total or state.count.shape != count:
            raise ValueError(
                f"relation_linear: got a state with total {tuple(state.total.shape)} and count "
                f"{tuple(state.count.shape)}, wanted {total} and {tuple(count)}"
            )


def new_total(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], *q.shape[2:], dtype=arithmetic_dtype(q))


forward_op = define(
    "relation_linear",
    "(Tensor q, Tensor k, Tensor? total, float eps, bool causal, str norm) -> (Tensor y, Tensor total)",
    **KERNELS.on_devices(lambda kernels, *args: kernels.forward(*args)),
    fake=lambda q, *rest: (q.new_empty(q.shape), new_total(q)),
)
backward_op = define(
    "relation_linear_backward",
    "(Tensor dy, Tensor? dtotal, Tensor q, Tensor k, Tensor? total, float eps, bool causal, str norm) "
    "-> (Tensor dq, Tensor dk, Tensor dtotal_in)",
    **KERNELS.on_devices(lambda kernels, *args: kernels.backward(*args), by=2),
    fake=lambda dy, dtotal, q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape), new_total(q)),
)
total_op = define(
    "relation_linear_total",
    "(Tensor k, float eps, str norm) -> Tensor",
    **KERNELS.on_devices(lambda kernels, *args: kernels.sum_keys(*args)),
    fake=lambda k, *rule: new_total(k),
)
total_backward_op = define(
    "relation_linear_total_backward",
    "(Tensor dtotal, Tensor k, float eps, str norm) -> Tensor",
    **KERNELS.on_devices(lambda kernels, *args: kernels.sum_keys_backward(*args), by=1),
    fake=lambda dtotal, k, *rule: k.new_empty(k.shape),
)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, total, *settings = inputs
    ctx.save_for_backward(q, k, total)
    ctx.settings = settings


def differentiate(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    q, k, total = ctx.saved_tensors
    dq, dk, dtotal_in = torch.ops.causalrn.relation_linear_backward(dy, dtotal, q, k, total, *ctx.settings)
    return dq, dk, None if total is None else dtotal_in, None, None, None


def save_keys(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, *settings = inputs
    ctx.save_for_backward(k)
    ctx.settings = settings


def differentiate_total(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    (k,) = ctx.saved_tensors
    return torch.ops.causalrn.relation_linear_total_backward(dtotal, k, *ctx.settings), None, None


forward_op.register_autograd(differentiate, setup_context=save_inputs)
total_op.register_autograd(differentiate_total, setup_context=save_keys)
