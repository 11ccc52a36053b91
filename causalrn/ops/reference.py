"""The definition of each relation operator: the equation itself, materialised, in any dtype, without tricks."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.ops.pairs import Norm, PairRule, PairTerms

ACTIVATIONS = {"exp": torch.exp, "relu": F.relu, "elu": F.elu, "gelu": F.gelu}


class LinearState(NamedTuple):
    """The state that the linear relation carries from one part of a sequence to the next.

    Attributes:
        total: sum over the positions seen so far of exp(norm(k_j)), float32, shape (B, H, D).
        count: number of positions seen so far, float32, shape (B,).
    """

    total: Float[Tensor, "B H D"]
    count: Float[Tensor, " B"]  # pyright: ignore[reportIncompatibleMethodOverride]


def normalise(x: Float[Tensor, "*shape D"], norm: Norm, eps: float) -> Float[Tensor, "*shape D"]:
    """Plain normalisation over the last axis: no affine part, eps added to the standard deviation.

    Equals the official `plain_layer_norm` ("layer", population standard deviation) and `plain_rms_norm`
    ("rms"); "none" returns x.
    """
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


def pair_weights(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    window: Int[Tensor, " H"] | None,
    slope: Float[Tensor, " H"] | None,
    like: Tensor,
) -> Float[Tensor, "#H Tq Tk"]:
    """Weight of each pair (i, j): 0 where j is out of reach, exp(-slope_h |i - j|) elsewhere.

    The queries are the last `n_queries` of the `n_keys` positions.
    """
    i = torch.arange(n_keys - n_queries, n_keys, device=like.device)[:, None]
    j = torch.arange(n_keys, device=like.device)
    distance = (i - j).abs()[None]
    reach = (j <= i)[None] if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        reach = reach & (distance < window.view(-1, 1, 1))
    weights = reach.to(like.dtype)
    if slope is not None:
        weights = weights * torch.exp(-slope.to(like.dtype).view(-1, 1, 1) * distance)
    return weights


def relation_quadratic_reference(
    q: Float[Tensor, "B Tq H D"], k: Float[Tensor, "B Tk H D"], terms: PairTerms, rule: PairRule
) -> Float[Tensor, "B Tq H D"]:
    """Quadratic relation: the mean over the reachable positions j of act(gain_ih norm(q_i + k_j)).

        out_ih = 1/n_ih * sum_{j reachable from i} exp(-slope_h |i - j|) act(gain_ih norm(q_ih + k_jh))

    j is reachable when j <= i (if causal) and |i - j| < window_h (if given); n_ih is their number. The
    queries are the last Tq of the Tk positions. By default this is the exact pre-activation
    normalisation of the paper (official `bar_quadratic_causal_preact`). Masked pairs add 0: the mask is
    applied after the activation, where the official code writes -inf before it (NaN for gelu, -1 for elu).
    """
    size, reach = (q.shape[1], k.shape[1]), {"causal": rule.causal, "window": terms.window, "like": q}
    weights = pair_weights(*size, slope=terms.slope, **reach)
    count = pair_weights(*size, slope=None, **reach).sum(-1)
    z = normalise(q[:, :, None] + k[:, None], rule.norm, rule.eps)
    if terms.gain is not None:
        z = z * terms.gain[:, None, :, None]
    pairs = ACTIVATIONS[rule.activation](z)
    return torch.einsum("bijhd,hij->bihd", pairs, weights.expand(q.shape[2], -1, -1)) / count.mT[:, :, None]


def relation_quadratic_log_reference(
    q: Float[Tensor, "B Tq H D"], k: Float[Tensor, "B Tk H D"], terms: PairTerms, rule: PairRule
) -> Float[Tensor, "B Tq H D"]:
    """Logarithm of `relation_quadratic_reference` with exp, which is finite for every gain.

    log out_ih = log sum_{j reachable from i} exp(gain_ih norm(q_ih + k_jh) - slope_h |i - j|) - log n_ih
    """
    n_queries, n_keys = q.shape[1], k.shape[1]
    reach = pair_weights(n_queries, n_keys, causal=rule.causal, window=terms.window, slope=None, like=q)
    z = normalise(q[:, :, None] + k[:, None], rule.norm, rule.eps)
    if terms.gain is not None:
        z = z * terms.gain[:, None, :, None]
    if terms.slope is not None:
        j = torch.arange(n_keys, device=q.device)
        i = j[n_keys - n_queries :, None]
        z = z - terms.slope.to(z.dtype)[:, None] * (i - j).abs()[:, :, None, None]
    z = z.masked_fill(reach.movedim(0, -1)[..., None] == 0, -torch.inf)
    return z.logsumexp(2) - reach.sum(-1).log().mT[:, :, None]


def relation_linear_reference(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T H D"],
    state: LinearState | None = None,
    *,
    eps: float,
    causal: bool = True,
    norm: Literal["layer", "rms"] = "layer",
) -> tuple[Float[Tensor, "B T H D"], LinearState]:
    """Linear relation: exp(norm(q_i)) * sum_{j<=i} exp(norm(k_j)), normalised over heads and channels.

        S_i = state.total + sum_{j<=i} exp(norm(k_j));   l_i = norm(q_i) + log S_i
        y_i = norm_HD(exp(l_i - max_hd l_i))

    The norms of q and k run over D (one head), the last one over H*D. The last norm erases any positive
    factor per token, so the 1/(i+1) of the paper and the subtracted maximum leave y as it is when eps = 0;
    eps is relative to rows scaled to a maximum of 1. Bidirectional: S_i is the sum over the whole part.
    Equals official `normalize(bar_linear_causal_stable(normalize(a), normalize(b)))`.
    """
    batch, length, heads, channels = q.shape
    exp_k = normalise(k, norm, eps).exp()
    start = 0.0 if state is None else state.total.to(exp_k.dtype)[:, None]
    sums = start + exp_k.cumsum(1)
    if not causal:
        sums = sums[:, -1:].expand_as(exp_k)
    log_y = (normalise(q, norm, eps) + sums.log()).flatten(2)
    y = normalise((log_y - log_y.amax(-1, keepdim=True)).exp(), norm, eps)
    count = torch.full((batch,), length, dtype=torch.float32, device=q.device)
    if state is not None:
        count = count + state.count
    return y.view(batch, length, heads, channels), LinearState(sums[:, -1], count)
