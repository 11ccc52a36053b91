"""The work of a network by formula: FLOPs of its matrix products, and exponentials."""

from dataclasses import dataclass
from functools import singledispatch

from torch import nn

from causalrn.models.attention import LinearAttention, SoftmaxAttention
from causalrn.models.language_model import LanguageModel
from causalrn.models.mixer import Mixer
from causalrn.models.pair_terms import UNBOUNDED
from causalrn.models.relation import LinearRelation, PositionalRelation, QuadraticRelation
from causalrn.models.short_convolution import ShortConvolution


@dataclass(frozen=True)
class Cost:
    """Work on one sequence.

    Attributes:
        flops: of matrix products and convolutions, two per multiply-add; what a device's dense peak counts. The sums and
            products of single pairs in the relation are not among them: they run beside its exponentials, which are its
            floor.
        exps: exponentials in the mixers. Pairs that the causal mask leaves out count nowhere, nor do those beyond the
            window of a relation's head.
    """

    flops: int
    exps: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.exps + other.exps)


def training_cost(network: LanguageModel, length: int) -> Cost:
    """A forward and a backward pass over one sequence.

    Backward takes two matrix products for each of the forward pass, and one more exponential for each: what is
    recomputed instead of kept. Activation checkpointing is not counted.

    Raises:
        TypeError: a mixer whose cost nobody registered.
    """
    cost = forward_cost(network, length)
    return Cost(3 * cost.flops, 2 * cost.exps)


def forward_cost(network: LanguageModel, length: int) -> Cost:
    cost = Cost(linear_flops(network.head, length), 0)
    for block in network.layers:
        cost += mixer_cost(block.mixer, length)
        # A shift multiplies nothing.
        if isinstance(block.short_convolution, ShortConvolution):
            cost += Cost(2 * length * block.short_convolution.convolution.weight.numel(), 0)
        if block.mlp is not None:
            cost += Cost(linear_flops(block.mlp, length), 0)
    return cost


def linear_flops(module: nn.Module, length: int) -> int:
    """FLOPs of all linear layers in a module, each applied at every position."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return 2 * length * sum(layer.weight.numel() for layer in layers)


def count_pairs(length: int, causal: bool, window: int = UNBOUNDED) -> int:
    """Pairs (i, j) with |i - j| below the window and, if causal, j <= i."""
    reach = min(window, length)
    before = reach * (reach + 1) // 2 + (length - reach) * reach
    return before if causal else 2 * before - length


@singledispatch
def mixer_cost(mixer: Mixer, length: int) -> Cost:
    """Forward cost of a mixer on one sequence; `mixer_cost.register` takes those of further mixers."""
    raise TypeError(f"the cost of {type(mixer).__name__} is not known; want one with mixer_cost.register")


@mixer_cost.register
def _(mixer: QuadraticRelation, length: int) -> Cost:
    # relu needs none, and gelu's error function is none.
    exps_per_pair = (
        mixer.d_hidden // mixer.n_heads if mixer.activation in ("exp", "elu", "official_elu") else 0
    )
    pairs = sum(count_pairs(length, mixer.causal, window) for window in windows_of(mixer))
    return Cost(linear_flops(mixer, length), pairs * exps_per_pair)


def windows_of(mixer: QuadraticRelation) -> list[int]:
    """Positions that each head reaches."""
    bias = mixer.bias if isinstance(mixer, PositionalRelation) else None
    windows = [None] * mixer.n_heads if bias is None or bias.windows is None else bias.windows
    return [UNBOUNDED if window is None else window for window in windows]


@mixer_cost.register
def _(mixer: LinearRelation, length: int) -> Cost:
    # exp(norm(k_j)), and exp of the sum that the last norm takes.
    return Cost(linear_flops(mixer, length), 2 * length * mixer.d_hidden)


@mixer_cost.register
def _(mixer: SoftmaxAttention, length: int) -> Cost:
    pairs = count_pairs(length, mixer.causal)
    # One product q_i k_j and one weighted v_j per pair.
    return Cost(linear_flops(mixer, length) + 4 * pairs * mixer.d_model, mixer.n_heads * pairs)


@mixer_cost.register
def _(mixer: LinearAttention, length: int) -> Cost:
    # The recurrence: a head adds k v^T to its state and multiplies it by q, whatever parts the sum is computed in.
    channels = mixer.d_model // mixer.n_heads
    flops = linear_flops(mixer, length) + 4 * length * mixer.d_model * channels
    return Cost(flops, 2 * length * mixer.d_model)
