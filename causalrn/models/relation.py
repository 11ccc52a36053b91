"""The relation mixers: quadratic (with the paper's ablations) and linear CausalRN."""

import math
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalrn.models.cache import GrowingCache
from causalrn.models.mixer import Mixer, Stream, check_heads, normal_linear_
from causalrn.models.pair_terms import Gain, PairBias, check_pair_terms
from causalrn.ops import (
    PairRule,
    PairTerms,
    normalise,
    relation_linear,
    relation_quadratic_shifted,
    relation_quadratic_step,
)
from causalrn.ops.reference import LinearState
from causalrn.system import check_range

OutputNorm = Literal["layer", "rms"]
Heads = Float[Tensor, "B T H D"]
# Means over pairs of whole sequences (B, T, H, D) or of one step (B, H, D), and the gains of their rows.
Means = Float[Tensor, "*shape H D"]
Gains = Float[Tensor, "*rows H"]
# Rows are scaled down to this before a norm, which would square them out of the range of floats: far above every eps.
LARGEST_NORMALISED = 2.0**60


class Relation(Mixer):
    """The base of both forms: out_proj(norm(relation(q_proj(norm(x)), k_proj(norm(x))))).

    q_proj (with bias) is the official fc_1 and sees the receiving position, k_proj (without) is fc_2 and
    sees the contributing one, out_proj is fc_3.

    Args:
        d_model: width C of the residual stream.
        d_hidden: channels of q and k over all heads.
        n_heads: groups of channels that are normalised apart inside the relation.
        causal: False lets every position see the whole sequence.
        norm: "layer" (population standard deviation) or "rms", always without an affine part.
        eps: added to the standard deviation; the official code uses 0.

    Raises:
        ValueError: d_hidden is not divisible by n_heads, or a number below what makes sense.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        n_heads: int = 1,
        causal: bool = True,
        norm: OutputNorm = "layer",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        check_range(self, "[1, inf)", d_hidden=d_hidden, n_heads=n_heads)
        check_range(self, "[0, inf)", eps=eps)
        check_heads(d_hidden, n_heads)
        self.d_hidden = d_hidden
        self.n_heads = n_heads
        self.norm: OutputNorm = norm
        self.eps = eps
        self.q_proj = nn.Linear(d_model, d_hidden)
        self.k_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.out_proj = nn.Linear(d_hidden, d_model)

    def reset_parameters(self, n_branches: int) -> None:
        normal_linear_(self.q_proj, 0.02)
        normal_linear_(self.k_proj, 0.02)
        normal_linear_(self.out_proj, 0.02 / math.sqrt(n_branches))

    def project(self, x: Stream) -> tuple[Heads, Heads]:
        x = normalise(x, self.norm, self.eps)
        q, k = self.q_proj(x), self.k_proj(x)
        return tuple(rearrange(t, "b t (h d) -> b t h d", h=self.n_heads) for t in (q, k))


class QuadraticRelation(Relation):
    """Quadratic CausalRN: every pair (i, j) is normalised before the activation, a memory that grows like a KV cache.

    Equals the official `BlockRAblation` (without its residual sum) and, with one head and eps 0, `BlockR`; see
    `QuadraticRelationScaledHeads` for the latter's other settings.

    Args:
        pre_norm: "exact" normalises q_i + k_j, "approx" normalises q_i and k_j apart, "none" neither.
        activation: the function of each pair. "official_elu" also adds the -1 = elu(-inf) that the official
            mask leaves at every future position (see `official_mask_shift`); the official gelu is NaN there.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        n_heads: int = 1,
        causal: bool = True,
        norm: OutputNorm = "layer",
        eps: float = 1e-5,
        pre_norm: Literal["exact", "approx", "none"] = "exact",
        activation: Literal["exp", "relu", "elu", "gelu", "official_elu"] = "exp",
    ) -> None:
        super().__init__(d_model, d_hidden, n_heads, causal, norm, eps)
        self.pre_norm = pre_norm
        self.activation: Literal["exp", "relu", "elu", "gelu", "official_elu"] = activation

    def project(self, x: Stream) -> tuple[Heads, Heads]:
        q, k = super().project(x)
        if self.pre_norm == "approx":
            q, k = (normalise(t, self.norm, self.eps) for t in (q, k))
        return q, k

    @property
    def pair_rule(self) -> PairRule:
        """The rule by which the operators form and take each pair."""
        activation = "elu" if self.activation == "official_elu" else self.activation
        return PairRule(self.eps, self.causal, self.norm if self.pre_norm == "exact" else "none", activation)

    def pair_terms(self, positions: Int[Tensor, "*shape"]) -> PairTerms:
        """The tensors that weigh the pairs of these receiving positions."""
        return PairTerms(self.gain_at(positions))

    def gain_at(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape H"] | None:
        """The factor on the normalised pairs at each receiving position; 1 if None."""
        return None

    def relate(self, q: Float[Tensor, "B Tq H D"], k: Float[Tensor, "B Tk H D"]) -> Float[Tensor, "B Tq H D"]:
        positions = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)
        terms = self.pair_terms(positions)
        out = self.finish(*relation_quadratic_shifted(q, k, terms, self.pair_rule), terms.gain)
        if self.activation == "official_elu" and self.causal:
            out = out + official_mask_shift(out)
        return out

    def relate_step(
        self, q: Float[Tensor, "B H D"], keys: Float[Tensor, "B S H D"], lengths: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H D"]:
        terms = self.pair_terms(lengths - 1)
        return self.finish(*relation_quadratic_step(q, keys, lengths, terms, self.pair_rule), terms.gain)

    def finish(self, mean: Means, shift: Means | None, gain: Gains | None) -> Means:
        """The value of mean * exp(shift) up to a factor per position, which `post_norm` erases; 1 in the usual range."""
        bound = math.log(LARGEST_NORMALISED)
        # Without a gain, the exponents of exactly normalised pairs are at most sqrt(D).
        plain = self.pre_norm == "exact" and gain is None and math.sqrt(mean.shape[-1]) < bound
        if self.activation != "exp" or plain:
            return mean
        out = mean
        if shift is not None:
            excess = (shift.amax((-2, -1), keepdim=True) - bound).clamp(min=0)
            out = (out * (shift - excess).exp()).to(mean.dtype)
        largest = out.detach().amax((-2, -1), keepdim=True)
        return out / (largest / LARGEST_NORMALISED).clamp(min=1)

    def combine(self, out: Heads) -> Stream:
        return self.out_proj(self.post_norm(rearrange(out, "b t h d -> b t (h d)")))

    def post_norm(self, out: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        return normalise(out, self.norm, self.eps)

    def forward(self, x: Stream) -> Stream:
        return self.combine(self.relate(*self.project(x)))

    def init_cache(
        self, batch_size: int, *, cache_dtype: torch.dtype | None = None, capacity: int = 0
    ) -> GrowingCache:
        self.check_causal()
        if self.activation == "official_elu":
            raise ValueError("activation official_elu depends on the length still to come; decode with elu")
        return GrowingCache(cache_dtype, capacity)

    def extend(self, x: Stream, cache: GrowingCache) -> tuple[Stream, GrowingCache]:
        q, k = self.project(x)
        keys = cache.append(k)
        if x.shape[1] > 1:
            return self.combine(self.relate(q, keys.to(q.dtype))), cache
        out = self.relate_step(q[:, 0], keys, cache.row_lengths(len(x), x.device))
        return self.combine(out[:, None]), cache

    def cache_bytes(self, length: int, cache_dtype: torch.dtype = torch.float32) -> int:
        return cache_dtype.itemsize * length * self.d_hidden


class QuadraticRelationWithoutPostNorm(QuadraticRelation):
    """The ablation without the normalisation after the sum (official `PostNorm: "no"`)."""

    def finish(self, mean: Means, shift: Means | None, gain: Gains | None) -> Means:
        return mean if shift is None else (mean * shift.exp()).to(mean.dtype)

    def post_norm(self, out: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        return out


class PositionalRelation(QuadraticRelation):
    """The quadratic relation whose pairs know where they stand: the weight is exp(gain_ih z_ijh - slope_h |i - j|).

    z_ijh = norm(q_i + k_j) over the channels of head h. A head may also have a window of the last positions, beyond
    which no pair counts. Made for sequences longer than those of the training; without `gain` and `bias` it is the
    paper's relation.

    Args:
        gain: factor on the normalised pairs, which sharpens as the receiving position grows; 1 if None.
        bias: slopes and windows of the heads; none if None.

    Raises:
        ValueError: a gain or bias of another number of heads.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        n_heads: int = 1,
        causal: bool = True,
        norm: OutputNorm = "layer",
        eps: float = 1e-5,
        gain: Gain | None = None,
        bias: PairBias | None = None,
    ) -> None:
        super().__init__(d_model, d_hidden, n_heads, causal, norm, eps)
        check_pair_terms(gain, bias, n_heads)
        self.gain = gain
        self.bias = bias

    def reset_parameters(self, n_branches: int) -> None:
        super().reset_parameters(n_branches)
        if self.gain is not None:
            self.gain.reset_parameters()

    def pair_terms(self, positions: Int[Tensor, "*shape"]) -> PairTerms:
        terms = super().pair_terms(positions)
        return terms if self.bias is None else PairTerms(terms.gain, self.bias.window, self.bias.slope)

    def gain_at(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape H"] | None:
        """The gain of every head in float32."""
        if self.gain is None:
            return None
        return self.gain(positions).float().expand(*positions.shape, self.n_heads)


class LogMeanExpRelation(PositionalRelation):
    """The positional relation with a logarithm of its order: log(mean_j exp(gain_ih z_ijh)) / gain_ih in place of the mean.

    A smooth maximum over the pairs. If one pair dominates, the output is that pair's z and does not depend on the gain. The
    next layer therefore sees the same values at every length, and all channels of z: exp(gain z) would leave little more
    than the greatest one.

    Args:
        gain: above 0.
    """

    def finish(self, mean: Means, shift: Means | None, gain: Gains | None) -> Means:
        out = mean.to(torch.promote_types(mean.dtype, torch.float32)).log()
        if shift is not None:
            out = out + shift
        return (out if gain is None else out / gain[..., None]).to(mean.dtype)


class LinearRelation(Relation):
    """Linear CausalRN: q and k are normalised apart, so that the sum factorises; the cache has constant size.

    Equals the official `BlockRLinear` without its residual sum.
    """

    def mix(self, x: Stream, cache: LinearState | None) -> tuple[Stream, LinearState]:
        q, k = self.project(x)
        y, end = relation_linear(q, k, cache, eps=self.eps, causal=self.causal, norm=self.norm)
        return self.out_proj(rearrange(y, "b t h d -> b t (h d)")), end

    def forward(self, x: Stream) -> Stream:
        return self.mix(x, None)[0]

    def init_cache(
        self, batch_size: int, *, cache_dtype: torch.dtype | None = None, capacity: int = 0
    ) -> LinearState:
        self.check_causal()
        device = self.q_proj.weight.device
        shape = (batch_size, self.n_heads, self.d_hidden // self.n_heads)
        return LinearState(torch.zeros(shape, device=device), torch.zeros(batch_size, device=device))

    def extend(self, x: Stream, cache: LinearState) -> tuple[Stream, LinearState]:
        return self.mix(x, cache)

    def cache_bytes(self, length: int, cache_dtype: torch.dtype = torch.float32) -> int:
        return 4 * (self.d_hidden + 1)


def official_mask_shift(out: Heads) -> Float[Tensor, "T 1 1"]:
    """The sum that the official -inf mask adds through elu: -1 for each of the T-1-i future positions, over i+1."""
    position = torch.arange(out.shape[1], device=out.device, dtype=out.dtype)
    return ((position + 1 - out.shape[1]) / (position + 1))[:, None, None]
