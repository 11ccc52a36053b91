"""Networks of every kind in small, and their exported form in this process."""

from collections.abc import Callable
from typing import Any

import torch

from causalrn.models import (
    MLP,
    Alibi,
    GatedMLP,
    HardAlibi,
    LanguageModel,
    LearnedLogLengthGain,
    LinearAttention,
    LinearRelation,
    LogMeanExpRelation,
    Mixer,
    NoPositions,
    PairBias,
    PositionalRelation,
    QuadraticRelation,
    QuadraticRelationScaledHeads,
    QuadraticRelationWithoutPostNorm,
    Rotary,
    ShortConvolution,
    SinusoidalPositions,
    SoftmaxAttention,
    TokenShift,
    describe,
)


def with_mixer(
    mixer: Mixer | list[Mixer], vocab_size: int = 256, max_length: int | None = 40, **settings: Any
):
    """A network whose logits are far enough apart that rounding decides no token."""
    network = LanguageModel(mixer, vocab_size, n_layers=2, max_length=max_length, **settings)
    torch.nn.init.normal_(network.head.weight)
    return network.eval()


def recipe(causal: bool) -> LanguageModel:
    """configs/copy/extrapolate.yaml in small."""
    gain, bias = LearnedLogLengthGain(2, reference=6.0), HardAlibi(2, 1)
    mixer = LogMeanExpRelation(8, 12, n_heads=2, causal=causal, gain=gain, bias=bias)
    endless = {"max_length": None, "positions": NoPositions()}
    return with_mixer(mixer, short_convolution=ShortConvolution(8, 3), **endless)


NETWORKS: dict[str, Callable[[bool], LanguageModel]] = {
    "quadratic": lambda c: with_mixer(QuadraticRelation(8, 12, n_heads=2, causal=c)),
    "approx gelu": lambda c: with_mixer(
        QuadraticRelation(8, 12, causal=c, pre_norm="approx", activation="gelu")
    ),
    "none relu": lambda c: with_mixer(QuadraticRelation(8, 12, causal=c, pre_norm="none", activation="relu")),
    "no post-norm": lambda c: with_mixer(QuadraticRelationWithoutPostNorm(8, 12, causal=c, norm="rms")),
    "scaled heads": lambda c: with_mixer(QuadraticRelationScaledHeads(8, 12, n_heads=2, causal=c, eps=1e-2)),
    "linear": lambda c: with_mixer(LinearRelation(8, 12, n_heads=3, causal=c)),
    "softmax": lambda c: with_mixer(SoftmaxAttention(8, n_heads=2, causal=c), mlp=MLP(8, 16)),
    "linear attention": lambda c: with_mixer(LinearAttention(8, n_heads=2, causal=c)),
    "recipe": recipe,
    "rotary, gated": lambda c: with_mixer(
        SoftmaxAttention(8, 2, causal=c, norm="rms", rotary=Rotary(), bias=PairBias([0.0, 0.3])),
        mlp=GatedMLP(8, 16),
        norm="rms",
        positions=SinusoidalPositions(),
    ),
    "alternating": lambda c: with_mixer(
        [LinearRelation(8, 12, causal=c), PositionalRelation(8, 10, 2, causal=c, bias=Alibi(2))],
        short_convolution=TokenShift(),
    ),
}


def make_network(mixer: Mixer, vocab_size: int = 256) -> LanguageModel:
    return with_mixer(mixer, vocab_size)


def make_model(network: LanguageModel) -> Any:
    from causalrn.interop.huggingface.configuration_causalrn import CausalRNConfig
    from causalrn.interop.huggingface.modeling_causalrn import CausalRNForCausalLM

    model = CausalRNForCausalLM(CausalRNConfig(describe(network)))
    model.network.load_state_dict(network.state_dict())
    return model.eval()
