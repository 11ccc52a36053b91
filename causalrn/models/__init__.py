"""Networks: the CausalRN language model, its mixers and the paper's baselines; nothing here knows of Lightning."""

from causalrn.models.attention import MLP, LinearAttention, SoftmaxAttention
from causalrn.models.description import build, describe
from causalrn.models.language_model import LanguageModel
from causalrn.models.mixer import Mixer
from causalrn.models.relation import LinearRelation, QuadraticRelation, QuadraticRelationWithoutPostNorm

__all__ = [
    "MLP",
    "LanguageModel",
    "LinearAttention",
    "LinearRelation",
    "Mixer",
    "QuadraticRelation",
    "QuadraticRelationWithoutPostNorm",
    "SoftmaxAttention",
    "build",
    "describe",
]
