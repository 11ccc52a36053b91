"""Terms of a pair of positions (i, j) beside its content: a gain of the receiving position, windows and decays per head."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalrn.system import check_range

# Wider than any sequence, for heads without a window.
UNBOUNDED = 2**30


class Gain(nn.Module, ABC):
    """A factor on the normalised pair (relation) or on the logits (attention), per head and receiving position."""

    @abstractmethod
    def forward(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape #H"]:
        """The factor at each position."""

    def reset_parameters(self) -> None:
        """Draws the initial values, where there are any."""


class LearnedGain(Gain):
    """One trained factor per head, the same at every position.

    Args:
        n_heads: number of heads of the mixer.
        start: the factor before training.

    Raises:
        ValueError: a start of 0 or less, which would tell no pair from another or prefer the worst.
    """

    def __init__(self, n_heads: int = 1, start: float = 1.0) -> None:
        super().__init__()
        check_range(self, "[1, inf)", n_heads=n_heads)
        check_range(self, "(0, inf)", start=start)
        self.n_heads = n_heads
        self.start = start
        self.factor = nn.Parameter(torch.empty(n_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.factor, self.start)

    def forward(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape H"]:
        return self.factor.expand(*positions.shape, -1)


class LogLengthGain(Gain):
    """1 + slope (ln(i + 2) - ln(reference)), at least `LEAST`.

    The best pair competes with i others, so the gain grows with log i: exp(gain z) of that pair then grows as a power of i.
    At the reference the gain is 1.

    Args:
        slope: growth per e-fold of the position.
        reference: the position + 2 at which the gain is 1, about the training length.

    Raises:
        ValueError: a reference of 0 or less.
    """

    # The first positions have nothing to tell apart; the order of a mean has to be above 0.
    LEAST = 0.1

    def __init__(self, slope: float = 0.4, reference: float = 100.0) -> None:
        super().__init__()
        check_range(self, "(-inf, inf)", slope=slope)
        check_range(self, "(0, inf)", reference=reference)
        self.slope = slope
        self.reference = reference

    def forward(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape #H"]:
        return (1 + self.slope * self.log_ratio(positions)).clamp(min=self.LEAST)[..., None]

    def log_ratio(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (positions + 2).float().log() - math.log(self.reference)


class LearnedLogLengthGain(LogLengthGain):
    """As `LogLengthGain`, with a factor and a slope per head that are trained.

    Args:
        n_heads: number of heads of the mixer.
        slope: before training.
        reference: the position + 2 at which the slope adds nothing.
    """

    def __init__(self, n_heads: int = 1, slope: float = 0.4, reference: float = 100.0) -> None:
        super().__init__(slope, reference)
        check_range(self, "[1, inf)", n_heads=n_heads)
        self.n_heads = n_heads
        self.factor = nn.Parameter(torch.empty(n_heads))
        self.growth = nn.Parameter(torch.empty(n_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.factor)
        nn.init.constant_(self.growth, self.slope)

    def forward(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape H"]:
        gain = self.factor + self.growth * self.log_ratio(positions)[..., None]
        return gain.clamp(min=self.LEAST)


class PairBias(nn.Module):
    """A weight exp(-slope_h |i - j|) on each pair after the normalisation, and a window per head beyond which it is 0.

    Inside the normalisation a bias that all channels share would be erased.

    Args:
        slopes: one per head; null for none at all.
        windows: one per head, of which a position reaches that many, itself included; null for no window.

    Raises:
        ValueError: a negative slope, an empty window, or slopes and windows of different numbers of heads.
    """

    slope: Tensor | None
    window: Tensor | None

    def __init__(
        self, slopes: Sequence[float] | None = None, windows: Sequence[int | None] | None = None
    ) -> None:
        super().__init__()
        if slopes is not None and windows is not None and len(slopes) != len(windows):
            raise ValueError(f"slopes and windows are one per head: got {len(slopes)} and {len(windows)}")
        for name, values in (("slopes", slopes), ("windows", windows)):
            if values is not None and not values:
                raise ValueError(f"{name} are one per head: got none; null stands for no {name}")
        check_range(self, "[0, inf)", slopes=slopes)
        check_range(self, "[1, inf)", windows=windows)
        self.slopes = None if slopes is None else list(slopes)
        self.windows = None if windows is None else list(windows)
        # Not in checkpoints: the settings say it all.
        self.register_buffer("slope", None if slopes is None else torch.tensor(self.slopes), persistent=False)
        sizes = None if windows is None else [UNBOUNDED if w is None else w for w in windows]
        self.register_buffer(
            "window", None if sizes is None else torch.tensor(sizes, dtype=torch.int32), persistent=False
        )

    def fill_buffers(self) -> None:
        """Writes the settings into the buffers again, where these were made without values."""
        fresh = PairBias(self.slopes, self.windows)
        for name in ("slope", "window"):
            if (values := getattr(fresh, name)) is not None:
                getattr(self, name).copy_(values)

    def log_weights(
        self, queries: Int[Tensor, "B Tq"], keys: Int[Tensor, " Tk"], causal: bool
    ) -> Float[Tensor, "B H Tq Tk"]:
        """The summand of attention's logits: -slope_h |i - j|, or -inf where j is out of reach."""
        distance = (queries[:, :, None] - keys)[:, None]
        reach = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            reach = reach & (distance.abs() < self.window[:, None, None])
        weights = torch.zeros_like(distance, dtype=torch.float32)
        if self.slope is not None:
            weights = -self.slope[:, None, None] * distance.abs()
        return weights.masked_fill(~reach, float("-inf"))


class Alibi(PairBias):
    """Geometric slopes 2^(-8 h / H), h = 1..H (arXiv 2108.12409)."""

    def __init__(self, n_heads: int) -> None:
        check_range(self, "[1, inf)", n_heads=n_heads)
        super().__init__(slopes=alibi_slopes(n_heads))
        self.n_heads = n_heads


class Nape(PairBias):
    """Half of the heads without positions, half with ALiBi's slopes (arXiv 2506.16640)."""

    def __init__(self, n_heads: int) -> None:
        check_range(self, "[1, inf)", n_heads=n_heads)
        without = n_heads // 2
        super().__init__(slopes=[0.0] * without + alibi_slopes(n_heads - without))
        self.n_heads = n_heads


class HardAlibi(PairBias):
    """The first heads see their last 1, 2, ... positions, the others everything (arXiv 2402.01032).

    Args:
        n_heads: number of heads of the mixer.
        n_windowed: how many of them have a window.
    """

    def __init__(self, n_heads: int, n_windowed: int) -> None:
        check_range(self, "[1, inf)", n_heads=n_heads)
        check_range(self, f"[0, {n_heads}]", n_windowed=n_windowed)
        super().__init__(windows=[*range(1, n_windowed + 1), *[None] * (n_heads - n_windowed)])
        self.n_heads = n_heads
        self.n_windowed = n_windowed


def alibi_slopes(n_heads: int) -> list[float]:
    return [2.0 ** (-8 * (head + 1) / n_heads) for head in range(n_heads)]


def check_pair_terms(gain: Gain | None, bias: PairBias | None, n_heads: int) -> None:
    """Raises a ValueError unless both are of this number of heads (or, as a gain may be, the same for all)."""
    counts = {
        "gain": getattr(gain, "n_heads", None),
        "slopes": bias and bias.slopes and len(bias.slopes),
        "windows": bias and bias.windows and len(bias.windows),
    }
    for name, count in counts.items():
        if count is not None and count != n_heads:
            raise ValueError(f"{name}: one value per head: got {count} for n_heads={n_heads}")
