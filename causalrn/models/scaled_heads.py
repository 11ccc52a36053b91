"""The quadratic relation in the official stable form, where each head is divided by its greatest channel."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.models.relation import OutputNorm, QuadraticRelation


class QuadraticRelationScaledHeads(QuadraticRelation):
    """The paper's relation with each head of each position divided by its greatest channel before the post-norm.

    Equals the official `BlockR` (without its residual sum), which runs `bar_quadratic_causal_preact_stable`: the sums over
    j are divided by the greatest of their head's channels, then by i + 1. The gradient takes the divisor for a constant, as
    there. With one head the post-norm erases any factor of a position where eps is 0, and this is `QuadraticRelation`.
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
        super().__init__(d_model, d_hidden, n_heads, causal, norm, eps)

    def relate(self, q: Float[Tensor, "B Tq H D"], k: Float[Tensor, "B Tk H D"]) -> Float[Tensor, "B Tq H D"]:
        if self.causal:
            counts = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device) + 1
        else:
            counts = torch.full(q.shape[1:2], k.shape[1], device=q.device)
        return scale_heads(super().relate(q, k), counts)

    def relate_step(
        self, q: Float[Tensor, "B H D"], keys: Float[Tensor, "B S H D"], lengths: Int[Tensor, " B"]
    ) -> Float[Tensor, "B H D"]:
        return scale_heads(super().relate_step(q, keys, lengths), lengths)


def scale_heads(mean: Float[Tensor, "*shape H D"], counts: Int[Tensor, " N"]) -> Float[Tensor, "*shape H D"]:
    """Divides the mean over `counts` pairs of each row by its greatest channel, and by `counts` again.

    The second division matters where eps is above 0, which is added to rows of this scale.
    """
    scaled = mean / mean.detach().amax(-1, keepdim=True)
    return scaled / counts.to(mean.dtype)[:, None, None]
