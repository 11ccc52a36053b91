"""The last part of a block, position by position: the paper's MLP, and a gated one."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from causalrn.models.mixer import given, normal_linear_
from causalrn.ops import normalise
from causalrn.system import check_range

# Channels of a gated MLP that nobody gave a width are rounded up to a multiple of this, which suits matrix products.
GATED_MULTIPLE = 64


class FeedForward(nn.Module, ABC):
    """The base of both MLPs, a residual branch that sees one position at a time.

    Args:
        d_model: width C of the residual stream. Only a config may leave it out: it is the mixer's then.
        d_hidden: channels between the projections.
        norm: plain normalisation of the input, see `Relation`.
        eps: added to the standard deviation.

    Raises:
        ValueError: no channels, or a negative eps.
    """

    def __init__(self, d_model: int, d_hidden: int, norm: Literal["layer", "rms"], eps: float) -> None:
        super().__init__()
        check_range(self, "[1, inf)", d_model=d_model, d_hidden=d_hidden)
        check_range(self, "[0, inf)", eps=eps)
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.norm: Literal["layer", "rms"] = norm
        self.eps = eps

    @abstractmethod
    def reset_parameters(self, n_branches: int) -> None:
        """Draws the initial values; output projections shrink with the model's number of residual branches."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape C"]:
        """The branch, which is added to the stream."""


class MLP(FeedForward):
    """The position-wise residual branch of a Transformer block: fc_2(gelu(fc_1(norm(x)))) (official `MLP`).

    Args:
        d_hidden: None for the paper's 4 * d_model.
    """

    def __init__(
        self,
        d_model: int | None = None,
        d_hidden: int | None = None,
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-5,
    ) -> None:
        d_model = given(self, d_model=d_model)
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        super().__init__(d_model, d_hidden, norm, eps)
        self.fc_1 = nn.Linear(d_model, d_hidden)
        self.fc_2 = nn.Linear(d_hidden, d_model)

    def reset_parameters(self, n_branches: int) -> None:
        normal_linear_(self.fc_1, 0.02)
        normal_linear_(self.fc_2, 0.02 / math.sqrt(n_branches))

    def forward(self, x: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape C"]:
        return self.fc_2(F.gelu(self.fc_1(normalise(x, self.norm, self.eps))))


class GatedMLP(FeedForward):
    """SwiGLU (arXiv 2002.05202): down_proj(silu(gate_proj(x)) * up_proj(x)) on norm(x), without biases.

    Args:
        d_hidden: None for 8/3 * d_model, rounded up to a multiple of 64: as many weights as the paper's MLP of 4 * d_model.
        norm: "rms" as in the networks that this MLP is known from, or "layer".
    """

    def __init__(
        self,
        d_model: int | None = None,
        d_hidden: int | None = None,
        norm: Literal["layer", "rms"] = "rms",
        eps: float = 1e-5,
    ) -> None:
        d_model = given(self, d_model=d_model)
        if d_hidden is None:
            d_hidden = math.ceil(8 * d_model / 3 / GATED_MULTIPLE) * GATED_MULTIPLE
        super().__init__(d_model, d_hidden, norm, eps)
        self.gate_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.up_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=False)

    def reset_parameters(self, n_branches: int) -> None:
        normal_linear_(self.gate_proj, 0.02)
        normal_linear_(self.up_proj, 0.02)
        normal_linear_(self.down_proj, 0.02 / math.sqrt(n_branches))

    def forward(self, x: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape C"]:
        h = normalise(x, self.norm, self.eps)
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))
