"""What stands before a mixer: each position blended with the few before it, by a short convolution or a shift."""

from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from causalrn.models.mixer import Mixer
from causalrn.ops import normalise
from causalrn.ops.context_parallel import active_split
from causalrn.system import check_range


class InputStage(Mixer):
    """A mixer whose input is norm(x) blended over the last `kernel_size` positions; the mixer normalises that again.

    The blend tells a position what came before it, in order, without saying where it stands. Its decoding state is
    the last kernel_size - 1 positions. A bidirectional mixer gets a centred blend.

    Args:
        mixer: what reads the blended stream.
        kernel_size: positions that are blended, each with itself.
        norm: plain normalisation of x.
        eps: added to its standard deviation.
    """

    def __init__(
        self,
        mixer: Mixer,
        kernel_size: int,
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(mixer.d_model, mixer.causal)
        check_range(self, "[1, inf)", kernel_size=kernel_size)
        check_range(self, "[0, inf)", eps=eps)
        self.mixer = mixer
        self.kernel_size = kernel_size
        self.norm: Literal["layer", "rms"] = norm
        self.eps = eps

    @abstractmethod
    def blend(self, x: Float[Tensor, "B S C"]) -> Float[Tensor, "B T C"]:
        """Each position but the first kernel_size - 1, blended with the ones before it."""

    def reset_parameters(self, n_branches: int) -> None:
        self.mixer.reset_parameters(n_branches)

    def prepare(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """What the mixer reads of a whole sequence.

        Raises:
            ValueError: the sequence is split over ranks.
        """
        if active_split() is not None:
            raise ValueError(
                f"{type(self).__name__} reads across the borders of a split sequence; want sequence_parallel off"
            )
        after = 0 if self.causal else (self.kernel_size - 1) // 2
        padding = (0, 0, self.kernel_size - 1 - after, after)
        return self.blend(F.pad(normalise(x, self.norm, self.eps), padding))

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        return self.mixer(self.prepare(x))

    def init_state(
        self, batch_size: int, *, pool_dtype: torch.dtype | None = None, capacity: int = 0
    ) -> tuple[Tensor, Any]:
        self.check_causal()
        inner = self.mixer.init_state(batch_size, pool_dtype=pool_dtype, capacity=capacity)
        device = next(self.mixer.parameters()).device
        return torch.zeros(batch_size, self.kernel_size - 1, self.d_model, device=device), inner

    def extend(
        self, x: Float[Tensor, "B T C"], state: tuple[Tensor, Any]
    ) -> tuple[Float[Tensor, "B T C"], tuple[Tensor, Any]]:
        h = normalise(x, self.norm, self.eps)
        h = torch.cat([state[0].to(h.dtype), h], dim=1)
        y, inner = self.mixer.extend(self.blend(h), state[1])
        return y, (h[:, h.shape[1] - self.kernel_size + 1 :].to(state[0].dtype), inner)

    def state_size(self, length: int, pool_dtype: torch.dtype = torch.float32) -> int:
        return 4 * (self.kernel_size - 1) * self.d_model + self.mixer.state_size(length, pool_dtype)


def mixer_name(mixer: Mixer) -> str:
    """Its class, within the classes of the input stages before it: `ShortConvolution(LogMeanExpRelation)`."""
    name = type(mixer).__name__
    return f"{name}({mixer_name(mixer.mixer)})" if isinstance(mixer, InputStage) else name


class ShortConvolution(InputStage):
    """A learned filter of `kernel_size` taps per channel (a depthwise convolution), with a bias."""

    def __init__(
        self,
        mixer: Mixer,
        kernel_size: int = 8,
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(mixer, kernel_size, norm, eps)
        self.convolution = nn.Conv1d(mixer.d_model, mixer.d_model, kernel_size, groups=mixer.d_model)

    def reset_parameters(self, n_branches: int) -> None:
        self.convolution.reset_parameters()
        super().reset_parameters(n_branches)

    def blend(self, x: Float[Tensor, "B S C"]) -> Float[Tensor, "B T C"]:
        return rearrange(self.convolution(rearrange(x, "b t c -> b c t")), "b c t -> b t c")


class TokenShift(InputStage):
    """The first half of the channels comes from the position before (arXiv 2305.13048): no parameters."""

    def __init__(self, mixer: Mixer, norm: Literal["layer", "rms"] = "layer", eps: float = 1e-5) -> None:
        super().__init__(mixer, 2, norm, eps)

    def blend(self, x: Float[Tensor, "B S C"]) -> Float[Tensor, "B T C"]:
        half = self.d_model // 2
        return torch.cat([x[:, :-1, :half], x[:, 1:, half:]], dim=-1)
