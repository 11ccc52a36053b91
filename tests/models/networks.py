"""Small networks of every kind: each mixer with each of its terms, blocks with a short convolution, patterns of mixers."""

from collections.abc import Callable

import torch

from causalrn.models import (
    MLP,
    Alibi,
    HardAlibi,
    LanguageModel,
    LearnedGain,
    LearnedLogLengthGain,
    LinearAttention,
    LinearRelation,
    LogLengthGain,
    LogMeanExpRelation,
    Mixer,
    Nape,
    NoPositions,
    PairBias,
    PositionalRelation,
    QuadraticRelation,
    QuadraticRelationScaledHeads,
    QuadraticRelationWithoutPostNorm,
    Rotary,
    ShortConvolution,
    ShortFilter,
    SoftmaxAttention,
    TokenShift,
)

GAINS = {
    "learned gain": lambda: LearnedGain(2, 1.3),
    "log gain": lambda: LogLengthGain(reference=5.0),
    "learned log gain": lambda: LearnedLogLengthGain(2, reference=5.0),
}
BIASES = {
    "slopes": lambda: PairBias(slopes=[0.0, 0.3]),
    "windows": lambda: PairBias(windows=[3, None]),
    "both": lambda: PairBias(slopes=[0.1, 0.3], windows=[None, 4]),
    "alibi": lambda: Alibi(2),
    "nape": lambda: Nape(2),
    "hard alibi": lambda: HardAlibi(2, 1),
}
# Each is made causal or not.
MIXERS: dict[str, Callable[[bool], Mixer]] = {
    "quadratic": lambda c: QuadraticRelation(8, 12, causal=c),
    "quadratic two heads": lambda c: QuadraticRelation(8, 12, n_heads=2, causal=c),
    "quadratic relu approx": lambda c: QuadraticRelation(
        8, 12, causal=c, pre_norm="approx", activation="relu"
    ),
    "quadratic scaled heads": lambda c: QuadraticRelationScaledHeads(8, 12, n_heads=2, causal=c, eps=1e-2),
    "quadratic no post-norm": lambda c: QuadraticRelationWithoutPostNorm(8, 12, causal=c),
    "quadratic, log of the mean": lambda c: LogMeanExpRelation(
        8, 12, 2, causal=c, gain=LogLengthGain(), bias=PairBias(slopes=[0.0, 0.2])
    ),
    "linear": lambda c: LinearRelation(8, 12, causal=c),
    "linear rms two heads": lambda c: LinearRelation(8, 12, n_heads=2, causal=c, norm="rms"),
    "softmax": lambda c: SoftmaxAttention(8, n_heads=2, causal=c),
    "softmax rotary": lambda c: SoftmaxAttention(8, 2, causal=c, rotary=Rotary()),
    "linear attention": lambda c: LinearAttention(8, n_heads=2, causal=c),
    **{
        f"{kind}, {name}": lambda c, cls=cls, size=size, make=make: cls(*size, causal=c, gain=make())
        for kind, cls, size in (
            ("quadratic", PositionalRelation, (8, 12, 2)),
            ("softmax", SoftmaxAttention, (8, 2)),
        )
        for name, make in GAINS.items()
    },
    **{
        f"{kind}, {name}": lambda c, cls=cls, size=size, make=make: cls(*size, causal=c, bias=make())
        for kind, cls, size in (
            ("quadratic", PositionalRelation, (8, 12, 2)),
            ("softmax", SoftmaxAttention, (8, 2)),
        )
        for name, make in BIASES.items()
    },
}
BLOCKS: dict[str, tuple[Callable[[], ShortFilter], Callable[[bool], Mixer]]] = {
    "convolution, quadratic": (lambda: ShortConvolution(8, 3), lambda c: QuadraticRelation(8, 12, causal=c)),
    "convolution, linear": (lambda: ShortConvolution(8), lambda c: LinearRelation(8, 12, causal=c)),
    "one tap, linear attention": (lambda: ShortConvolution(8, 1), lambda c: LinearAttention(8, causal=c)),
    "shift, softmax": (lambda: TokenShift(norm="rms"), lambda c: SoftmaxAttention(8, 2, causal=c)),
}
PATTERNS: dict[str, Callable[[], list[Mixer]]] = {
    "two linear, one quadratic": lambda: [
        LinearRelation(8, 12),
        LinearRelation(8, 8),
        QuadraticRelation(8, 12),
    ],
    "attentions": lambda: [LinearAttention(8, 2), SoftmaxAttention(8)],
    "quadratic forms": lambda: [
        LogMeanExpRelation(8, 12, 2, gain=LogLengthGain(reference=5.0)),
        QuadraticRelation(8, 6, activation="relu"),
    ],
}
NAMES = (*MIXERS, *BLOCKS, *PATTERNS)


def make_network(name: str) -> LanguageModel:
    """The causal network of this name, with 11 tokens, and at least 40 positions."""
    if name in PATTERNS:
        network = LanguageModel(
            PATTERNS[name](),
            vocab_size=11,
            n_layers=4,
            positions=NoPositions(),
            mlp=MLP(8, 16),
            short_convolution=ShortConvolution(8, 3),
        )
    elif name in BLOCKS:
        convolution, mixer = BLOCKS[name]
        network = LanguageModel(
            mixer(True), 11, n_layers=2, positions=NoPositions(), short_convolution=convolution()
        )
    else:
        # A Transformer's attention has an MLP behind it.
        mlp = MLP(8, 16) if name.startswith("softmax") else None
        network = LanguageModel(MIXERS[name](True), 11, n_layers=2, max_length=40, mlp=mlp)
    # Logits far enough apart that rounding decides no token.
    torch.nn.init.normal_(network.head.weight)
    return network.eval()
