"""Numbers of a relation's pairs, layer by layer, which tell a run that copies from one that does not."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalrn.evaluation.metrics import IGNORE_INDEX
from causalrn.models import Block, LanguageModel, LinearRelation, QuadraticRelation
from causalrn.ops import normalisation
from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.ops.quadratic.eager import TILE_ELEMENTS, reach
from causalrn.ops.reference import ACTIVATIONS, normalise

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95, "max": 1.0}
# A position counts as saturated where its largest exponent is at least this share of the bound.
SATURATED = 0.9


@dataclass(frozen=True)
class Pairs:
    """One layer's pairs (i, j) of some receiving positions i, with the channels reduced.

    Attributes:
        positions: the receiving positions i.
        reached: the pairs that count.
        inverse_std: 1 / (s_ij + eps); None where q and k are not normalised together.
        largest: largest exponent, max_d of what the activation is taken of.
        log_norm: log of the norm over the channels of what j adds to i, -inf where j is out of reach.
        bound: what no exponent of a position can exceed; None without a normalisation.
    """

    positions: Int[Tensor, " P"]
    reached: Tensor
    inverse_std: Float[Tensor, "B H P T"] | None
    largest: Float[Tensor, "B H P T"]
    log_norm: Float[Tensor, "B H P T"]
    bound: Float[Tensor, "#H P"] | None

    def effective_positions(self) -> Float[Tensor, "B H P"]:
        """Participation ratio (sum_j n_ij)^2 / sum_j n_ij^2 of the norms: 1 where one j is all, i + 1 where all are equal."""
        return (2 * self.log_norm.logsumexp(-1) - (2 * self.log_norm).logsumexp(-1)).exp()

    def top_share(self) -> Float[Tensor, "B H P"]:
        """Share of the strongest j in the sum of the norms."""
        return (self.log_norm.amax(-1) - self.log_norm.logsumexp(-1)).exp()

    def counts(self) -> Float[Tensor, "#H P"]:
        """Number of positions that each receiving position can reach."""
        return self.reached.sum(-1).float()

    def summary(self) -> dict[str, float]:
        """The layer in numbers, see docs/metrics.md."""
        values = {}
        reached = self.reached.expand_as(self.largest)
        for name, pairs in (("inverse_std", self.inverse_std), ("largest_exponent", self.largest)):
            if pairs is not None:
                ordered = pairs[reached].sort().values
                for label, level in QUANTILES.items():
                    values[f"{name}_{label}"] = ordered[round(level * (len(ordered) - 1))].item()
        effective, counts = self.effective_positions(), self.counts()
        values["effective_positions"] = effective.mean().item()
        values["effective_share"] = (effective / counts).mean().item()
        values["top_share"] = self.top_share().mean().item()
        if self.bound is not None:
            highest = self.largest.where(reached, -math.inf).amax(-1)
            share = highest / self.bound
            values["saturation"] = share.mean().item()
            values["saturated"] = (share >= SATURATED).float().mean().item()
        if (slope := dispersion(effective.mean((0, 1)), counts.mean(0))) is not None:
            values["dispersion"] = slope
        return values


def dispersion(effective: Float[Tensor, " P"], counts: Float[Tensor, " P"]) -> float | None:
    """Exponent a of effective ~ count^a: 0 where retrieval stays sharp as the sequence grows, 1 where what is added
    spreads over all of it. The median of the slopes of all pairs of points (Theil and Sen), which single positions of
    another kind, such as the last one of a copied string, do not move. None where the counts differ too little to tell.
    """
    if len(counts) < 2 or counts.max() < 1.5 * counts.min():
        return None
    x, y = counts.log(), effective.log()
    run, rise = (values[:, None] - values for values in (x, y))
    return (rise[run > 0] / run[run > 0]).median().item()


@torch.no_grad()
def probe(network: LanguageModel, tokens: Int[Tensor, "B T"], positions: Int[Tensor, " P"]) -> list[Pairs]:
    """Every layer's pairs while the network reads `tokens`, at the given receiving positions.

    Memory beside the network's own is that of the returned values and of one tile of `TILE_ELEMENTS` channels.

    Raises:
        ValueError: a layer that is no relation.
    """
    found: list[Pairs] = []

    def look(mixer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(mixer, QuadraticRelation | LinearRelation)
        q, k = mixer.project(inputs[0])
        found.append(probe_pairs(mixer, q.float(), k.float(), positions))

    handles = [relation_of(block).register_forward_pre_hook(look) for block in network.layers]
    try:
        # Compiled code would leave hooks out.
        with torch.compiler.set_stance("force_eager"):
            network(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return found


def relation_of(block: Block) -> QuadraticRelation | LinearRelation:
    if isinstance(block.mixer, QuadraticRelation | LinearRelation):
        return block.mixer
    raise ValueError(f"pairs are those of relation mixers: got a layer with {type(block.mixer).__name__}")


def probe_pairs(
    mixer: QuadraticRelation | LinearRelation,
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T H D"],
    positions: Int[Tensor, " P"],
) -> Pairs:
    """The pairs of one layer by the definition of its operator, tile by tile over the contributing positions."""
    if isinstance(mixer, LinearRelation):
        q, k = (normalise(x, mixer.norm, mixer.eps) for x in (q, k))
        terms, rule = PairTerms(), PairRule(0.0, mixer.causal, "none")
    else:
        terms, rule = mixer.pair_terms(positions), mixer.pair_rule
    reached, log_weight = (x[0] for x in reach(positions[None], slice(0, k.shape[1]), terms, mixer.causal))
    batch, length, heads, channels = k.shape
    size = max(1, TILE_ELEMENTS // (batch * heads * channels))
    shape = (batch, heads, len(positions), length)
    inverse_std, largest, log_norm = (k.new_zeros(shape) for _ in range(3))
    for p, position in enumerate(positions.tolist()):
        gain = None if terms.gain is None else terms.gain[p]
        end = position + 1 if mixer.causal else length
        for start in range(0, end, size):
            tile = slice(start, min(start + size, end))
            x = q[:, position, :, None] + k[:, tile].transpose(1, 2)
            z, spread = normalisation.eager(x, rule.norm, rule.eps)
            z = z if gain is None else z * gain[:, None, None]
            inverse_std[:, :, p, tile] = 1 / (spread + rule.eps)
            largest[:, :, p, tile] = z.amax(-1)
            log_norm[:, :, p, tile] = log_norms(z, rule.activation)
    log_norm = (log_norm + log_weight).where(reached, -math.inf)
    bound = bound_of(mixer, channels)
    if bound is not None:
        bound = bound * (
            torch.ones(1, len(positions), device=k.device) if terms.gain is None else terms.gain.mT
        )
    exact = rule.norm != "none"
    return Pairs(positions, reached, inverse_std if exact else None, largest, log_norm, bound)


def log_norms(z: Float[Tensor, "*shape D"], activation: str) -> Float[Tensor, "*shape"]:
    """Log of |act(z)| over the channels; of exp in the logarithm, where its squares would overflow."""
    if activation == "exp":
        return (2 * z).logsumexp(-1) / 2
    return ACTIVATIONS[activation](z).norm(dim=-1).log()


def bound_of(mixer: QuadraticRelation | LinearRelation, channels: int) -> float | None:
    """sqrt(D - 1) for one centred and normalised vector, sqrt(D) without centring, twice that for the sum of two."""
    if isinstance(mixer, QuadraticRelation) and mixer.pre_norm == "none":
        return None
    apart = isinstance(mixer, LinearRelation) or mixer.pre_norm == "approx"
    return math.sqrt(channels - 1 if mixer.norm == "layer" else channels) * (2 if apart else 1)


def trained_positions(targets: Int[Tensor, "B T"], at_most: int) -> Int[Tensor, " P"]:
    """Receiving positions to look at: those that the loss is taken at in any row, evenly thinned out."""
    positions = (targets != IGNORE_INDEX).any(0).nonzero()[:, 0]
    if len(positions) <= at_most:
        return positions
    chosen = torch.linspace(0, len(positions) - 1, at_most, device=targets.device).round().long()
    return positions[chosen]
