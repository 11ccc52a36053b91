"""The formulas for FLOPs and exponentials against what PyTorch counts while the definitions run."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from causalrn.models import (
    MLP,
    LanguageModel,
    LinearAttention,
    LinearRelation,
    PairBias,
    PositionalRelation,
    QuadraticRelation,
    ShortConvolution,
    SoftmaxAttention,
    TokenShift,
)
from causalrn.models.cost import Cost, forward_cost, linear_flops, mixer_cost, training_cost
from causalrn.ops import reference
from tests.models.networks import PATTERNS, make_network

LENGTH = 12
MIXERS = {
    "quadratic": lambda causal: QuadraticRelation(16, 24, n_heads=2, causal=causal),
    "linear": lambda causal: LinearRelation(16, 24, n_heads=2, causal=causal),
    "convolution": lambda causal: QuadraticRelation(16, 24, causal=causal),
    "shift": lambda causal: LinearRelation(16, 24, n_heads=2, causal=causal),
    "softmax": lambda causal: SoftmaxAttention(16, n_heads=2, causal=causal),
    "linear attention": lambda causal: LinearAttention(16, n_heads=2, causal=causal),
}


class CountExps(TorchDispatchMode):
    """Counts elements that go through exp."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.exp.default:
            self.count += out.numel()
        return out


def make(name: str, causal: bool) -> LanguageModel:
    mlp = MLP(16, 64) if "attention" in name or name == "softmax" else None
    convolution = {"convolution": ShortConvolution(16, 4), "shift": TokenShift()}.get(name)
    return LanguageModel(
        MIXERS[name](causal),
        vocab_size=11,
        n_layers=3,
        max_length=LENGTH,
        mlp=mlp,
        short_convolution=convolution,
    )


@pytest.mark.parametrize("name", ["quadratic", "linear", "convolution", "shift", "softmax"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    # Bidirectional: torch counts what a causal mask leaves out as well.
    network = make(name, causal=False)
    tokens = torch.randint(11, (1, LENGTH))
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):
        with forward:
            loss = network(tokens).sum()
        with backward:
            loss.backward()
    assert forward.get_total_flops() == forward_cost(network, LENGTH).flops
    # Torch counts a depthwise convolution's backward pass as if every channel met every other.
    if "convolution" not in name:
        total = forward.get_total_flops() + backward.get_total_flops()
        assert total == training_cost(network, LENGTH).flops


def test_flops_of_linear_attention_are_those_of_its_recurrence() -> None:
    mixer = LinearAttention(16, n_heads=2)
    x = torch.randn(1, LENGTH, 16)
    with FlopCounterMode(display=False) as counter:
        q, k, v = mixer.project(x)
        state = torch.einsum("bjhd,bjhe->bhde", k, v)
        mixer.out_proj(torch.einsum("bihd,bhde->bihe", q, state).flatten(2))
    assert mixer_cost(mixer, LENGTH).flops == counter.get_total_flops()


def plain_quadratic(*inputs: Any) -> tuple[Tensor, None]:
    return reference.relation_quadratic_reference(*inputs), None


@pytest.mark.parametrize("name", ["quadratic", "linear", "convolution", "shift"])
def test_exps_are_those_of_the_definition(name: str) -> None:
    network = make(name, causal=False)
    definitions = {
        "relation_quadratic_shifted": plain_quadratic,
        "relation_linear": reference.relation_linear_reference,
    }
    with mock.patch.multiple("causalrn.models.relation", **definitions), CountExps() as counter:
        network(torch.randint(11, (1, LENGTH)))
    assert counter.count == forward_cost(network, LENGTH).exps
    assert training_cost(network, LENGTH).exps == 2 * counter.count


def test_causal_pairs_are_counted_once() -> None:
    for name, per_pair in (("quadratic", 24), ("softmax", 2)):
        pairs = LENGTH * (LENGTH + 1) // 2
        assert mixer_cost(MIXERS[name](True), LENGTH).exps == pairs * per_pair
    attention = mixer_cost(SoftmaxAttention(16), LENGTH).flops
    assert attention == 2 * LENGTH * 4 * 16 * 16 + 4 * LENGTH * (LENGTH + 1) // 2 * 16


def test_activations_without_exponentials_cost_none() -> None:
    for activation in ("relu", "gelu"):
        assert mixer_cost(QuadraticRelation(16, 24, activation=activation), LENGTH).exps == 0


@pytest.mark.parametrize("windows", [[3, None], [1, LENGTH], [5, 2 * LENGTH]], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_beyond_a_window_are_not_counted(windows: list[int | None], causal: bool) -> None:
    bias = PairBias(windows=windows)
    mixer = PositionalRelation(16, 24, n_heads=2, causal=causal, bias=bias)
    assert bias.window is not None
    reached = reference.pair_weights(
        LENGTH, LENGTH, causal=causal, window=bias.window, slope=None, like=torch.zeros(1)
    )
    assert mixer_cost(mixer, LENGTH).exps == int(reached.sum()) * 24 // 2


def test_an_unknown_mixer_is_named_and_can_be_registered() -> None:
    class Other(MLP):
        """A mixer of which nobody knows the cost."""

    with pytest.raises(TypeError, match="Other is not known"):
        mixer_cost(Other(16, 64), LENGTH)
    mixer_cost.register(Other, lambda mixer, length: Cost(7 * length, 0))
    assert mixer_cost(Other(16, 64), LENGTH) == Cost(7 * LENGTH, 0)


def test_the_papers_model_needs_what_the_paper_says() -> None:
    network = LanguageModel(QuadraticRelation(192, 192), vocab_size=29, n_layers=12, max_length=34)
    weights = 12 * 3 * 192 * 192 + 29 * 192
    cost = training_cost(network, 34)
    assert cost.flops == 6 * weights * 34
    assert cost.exps == 2 * 12 * 34 * 35 // 2 * 192


@pytest.mark.parametrize("name", PATTERNS)
def test_the_cost_of_alternating_layers_is_their_sum(name: str) -> None:
    alternating = make_network(name)
    parts = [mixer_cost(block.mixer, 9) for block in alternating.layers]
    around = linear_flops(alternating.head, 9) + 4 * (2 * 9 * 2 * 8 * 16 + 2 * 9 * 3 * 8)
    total = Cost(around + sum(part.flops for part in parts), sum(part.exps for part in parts))
    assert forward_cost(alternating, 9) == total
