"""The first part of a block: each position blended with the few before it, by a short convolution or a shift."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from causalrn.models.mixer import Stream, given
from causalrn.ops import normalise
from causalrn.ops.context_parallel import active_split
from causalrn.system import check_range


class ShortFilter(nn.Module, ABC):
    """norm(x) blended over the last `kernel_size` positions. The mixer of a block reads the result, and normalises it again.

    The blend tells a position what came before it, in order, without saying where it stands. Decoding keeps the last
    kernel_size - 1 positions. A bidirectional mixer gets a centred blend.

    Args:
        kernel_size: positions that are blended, each with itself.
        norm: plain normalisation of x.
        eps: added to its standard deviation.
    """

    # Channels that the filter is made for; None where it takes any number.
    d_model: int | None = None

    def __init__(self, kernel_size: int, norm: Literal["layer", "rms"] = "layer", eps: float = 1e-5) -> None:
        super().__init__()
        check_range(self, "[1, inf)", kernel_size=kernel_size)
        check_range(self, "[0, inf)", eps=eps)
        self.kernel_size = kernel_size
        self.norm: Literal["layer", "rms"] = norm
        self.eps = eps

    @abstractmethod
    def blend(self, x: Float[Tensor, "B S C"]) -> Stream:
        """Each position but the first kernel_size - 1, blended with the ones before it."""

    def reset_parameters(self) -> None:
        """Draws the initial values, where there are any."""

    def forward(self, x: Stream, causal: bool = True) -> Stream:
        """The mixer's input for a whole sequence.

        Raises:
            ValueError: the sequence is split over ranks.
        """
        if active_split() is not None:
            raise ValueError(
                f"{type(self).__name__} reads across the borders of a split sequence; want context_parallel off"
            )
        after = 0 if causal else (self.kernel_size - 1) // 2
        padding = (0, 0, self.kernel_size - 1 - after, after)
        return self.blend(F.pad(normalise(x, self.norm, self.eps), padding))

    def extend(self, x: Stream, before: Float[Tensor, "B S C"]) -> tuple[Stream, Float[Tensor, "B S C"]]:
        """The mixer's input at the next T positions, and the last positions to blend the following ones with."""
        h = normalise(x, self.norm, self.eps)
        h = torch.cat([before.to(h.dtype), h], dim=1)
        return self.blend(h), h[:, h.shape[1] - self.kernel_size + 1 :].to(before.dtype)


class ShortConvolution(ShortFilter):
    """A learned filter of `kernel_size` taps per channel (a depthwise convolution), with a bias.

    Args:
        d_model: width C of the residual stream. Only a config may leave it out: it is the mixer's then.
    """

    def __init__(
        self,
        d_model: int | None = None,
        kernel_size: int = 8,
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(kernel_size, norm, eps)
        d_model = given(self, d_model=d_model)
        check_range(self, "[1, inf)", d_model=d_model)
        self.d_model = d_model
        self.convolution = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model)

    def reset_parameters(self) -> None:
        self.convolution.reset_parameters()

    def blend(self, x: Float[Tensor, "B S C"]) -> Stream:
        return rearrange(self.convolution(rearrange(x, "b t c -> b c t")), "b c t -> b t c")


class TokenShift(ShortFilter):
    """The first half of the channels comes from the position before (arXiv 2305.13048): no parameters."""

    def __init__(self, norm: Literal["layer", "rms"] = "layer", eps: float = 1e-5) -> None:
        super().__init__(2, norm, eps)

    def blend(self, x: Float[Tensor, "B S C"]) -> Stream:
        half = x.shape[-1] // 2
        return torch.cat([x[:, :-1, :half], x[:, 1:, half:]], dim=-1)
