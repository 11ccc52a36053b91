"""Networks: the CausalRN language model, its mixers and the paper's baselines; nothing here knows of Lightning."""

from causalrn.models.attention import LinearAttention, SoftmaxAttention
from causalrn.models.block import Block
from causalrn.models.description import build, describe, upgrade
from causalrn.models.language_model import LanguageModel
from causalrn.models.mixer import Mixer
from causalrn.models.mlp import MLP, FeedForward, GatedMLP
from causalrn.models.pair_terms import (
    Alibi,
    HardAlibi,
    LearnedGain,
    LearnedLogLengthGain,
    LogLengthGain,
    Nape,
    PairBias,
)
from causalrn.models.positions import (
    LearnedPositions,
    NoPositions,
    RandomPositions,
    Rotary,
    SinusoidalPositions,
)
from causalrn.models.relation import (
    LinearRelation,
    LogMeanExpRelation,
    PositionalRelation,
    QuadraticRelation,
    QuadraticRelationWithoutPostNorm,
)
from causalrn.models.scaled_heads import QuadraticRelationScaledHeads
from causalrn.models.short_convolution import ShortConvolution, ShortFilter, TokenShift

__all__ = [
    "MLP",
    "Alibi",
    "Block",
    "FeedForward",
    "GatedMLP",
    "HardAlibi",
    "LanguageModel",
    "LearnedGain",
    "LearnedLogLengthGain",
    "LearnedPositions",
    "LinearAttention",
    "LinearRelation",
    "LogLengthGain",
    "LogMeanExpRelation",
    "Mixer",
    "Nape",
    "NoPositions",
    "PairBias",
    "PositionalRelation",
    "QuadraticRelation",
    "QuadraticRelationScaledHeads",
    "QuadraticRelationWithoutPostNorm",
    "RandomPositions",
    "Rotary",
    "ShortConvolution",
    "ShortFilter",
    "SinusoidalPositions",
    "SoftmaxAttention",
    "TokenShift",
    "build",
    "describe",
    "upgrade",
]
