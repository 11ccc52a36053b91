"""Schemes by which a token's embedding says where it stands: learned (the paper), not at all, sinusoidal, or at random places."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalrn.system import check_range

Embedded = Float[Tensor, "*batch T C"]
# One line of positions for all rows, or one for each.
Places = Int[Tensor, "*rows T"]


class Positions(nn.Module, ABC):
    """Tells positions apart by what it adds to the embeddings. A scheme without an end has `max_length` None."""

    max_length: int | None = None

    @abstractmethod
    def forward(self, x: Embedded, positions: Places) -> Embedded:
        """x with its positions."""

    def reset_parameters(self) -> None:
        """Draws the initial values, where there are any."""


class LearnedPositions(Positions):
    """One learned vector per position, N(0, 1) at first (official `wpe`): the model ends at `max_length`."""

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        check_range(self, "[1, inf)", max_length=max_length, d_model=d_model)
        self.max_length = max_length
        self.d_model = d_model
        self.weight = nn.Parameter(torch.empty(max_length, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def forward(self, x: Embedded, positions: Places) -> Embedded:
        return x + self.weight[positions]


class NoPositions(Positions):
    """Nothing: only the mixers know an order, by what a position can see."""

    def forward(self, x: Embedded, positions: Places) -> Embedded:
        return x


class SinusoidalPositions(Positions):
    """Fixed sines and cosines (arXiv 1706.03762), scaled to the variance 1 of the token embeddings.

    Args:
        longest_wavelength: of the slowest channels, in units of 2 pi positions.
    """

    def __init__(self, longest_wavelength: float = 10_000.0) -> None:
        super().__init__()
        check_range(self, "(0, inf)", longest_wavelength=longest_wavelength)
        self.longest_wavelength = longest_wavelength

    def forward(self, x: Embedded, positions: Places) -> Embedded:
        channels = x.shape[-1]
        angles = rotary_angles(positions, channels + channels % 2, self.longest_wavelength)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :channels]
        return x + (math.sqrt(2) * waves).to(x.dtype)


class RandomPositions(Positions):
    """Randomised positions (arXiv 2305.16843): training places each row on a sorted draw from a longer range.

    Every position of the range is so met in training. Evaluation and decoding take the positions as they are, so that a
    position does not depend on how long the sequence becomes; the paper draws there too.

    Args:
        positions: the scheme that embeds the drawn positions.
        max_length: end of the range; learned positions need as many.

    Raises:
        ValueError: the scheme ends before the range does.
    """

    def __init__(self, positions: Positions, max_length: int) -> None:
        super().__init__()
        check_range(self, "[1, inf)", max_length=max_length)
        if positions.max_length is not None and positions.max_length < max_length:
            raise ValueError(
                f"RandomPositions draws below max_length={max_length}: its scheme ends at {positions.max_length}"
            )
        self.positions = positions
        self.max_length = max_length

    def reset_parameters(self) -> None:
        self.positions.reset_parameters()

    def forward(self, x: Embedded, positions: Places) -> Embedded:
        if self.training:
            assert self.max_length is not None
            draws = torch.rand(len(x), self.max_length, device=x.device).argsort(dim=-1)
            positions = draws[:, : x.shape[1]].sort(dim=-1).values
        return self.positions(x, positions)


class Rotary(nn.Module):
    """Turns q and k of attention by angles that grow with the position (arXiv 2104.09864): q . k sees i - j only.

    Args:
        longest_wavelength: of the slowest pair of channels, in units of 2 pi positions.
    """

    def __init__(self, longest_wavelength: float = 10_000.0) -> None:
        super().__init__()
        check_range(self, "(0, inf)", longest_wavelength=longest_wavelength)
        self.longest_wavelength = longest_wavelength

    def forward(
        self, x: Float[Tensor, "B T H D"], positions: Int[Tensor, "#B T"]
    ) -> Float[Tensor, "B T H D"]:
        angles = rotary_angles(positions, x.shape[-1], self.longest_wavelength)[:, :, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def rotary_angles(
    positions: Places, channels: int, longest_wavelength: float
) -> Float[Tensor, "*rows T half"]:
    """Position times the frequency of each pair of channels, from 1 down to 1 / longest_wavelength."""
    # In float64: float32 knows the phase of position 1e6 to a tenth only.
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / channels
    return (positions[..., None] * longest_wavelength**-exponents).remainder(2 * math.pi).float()
