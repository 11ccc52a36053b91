"""One layer: a short convolution where there is one, the mixer, and an MLP where there is one."""

from typing import Any

import torch
from torch import Tensor, nn

from causalrn.models.mixer import Mixer, Stream
from causalrn.models.mlp import FeedForward
from causalrn.models.short_convolution import ShortFilter


class Block(nn.Module):
    """x + mixer(short_convolution(x)), then x + mlp(x); a part that is None is left out.

    The cache is the mixer's, behind a short convolution together with the positions that this keeps.
    """

    def __init__(self, short_convolution: ShortFilter | None, mixer: Mixer, mlp: FeedForward | None) -> None:
        super().__init__()
        # The order of the parameters is that of an optimizer's state: the mixer's have always come first.
        self.mixer = mixer
        self.short_convolution = short_convolution
        self.mlp = mlp
        self.register_load_state_dict_pre_hook(rename_former_keys)

    def reset_parameters(self, n_branches: int) -> None:
        """Draws all initial values anew; `n_branches` as `Mixer.reset_parameters`."""
        if self.short_convolution is not None:
            self.short_convolution.reset_parameters()
        self.mixer.reset_parameters(n_branches)
        if self.mlp is not None:
            self.mlp.reset_parameters(n_branches)

    def mixer_input(self, x: Stream) -> Stream:
        """The mixer's input for a whole sequence."""
        return x if self.short_convolution is None else self.short_convolution(x, self.mixer.causal)

    def forward(self, x: Stream) -> Stream:
        return self.feed_forward(x + self.mixer(self.mixer_input(x)))

    def feed_forward(self, x: Stream) -> Stream:
        return x if self.mlp is None else x + self.mlp(x)

    def init_cache(
        self, batch_size: int, *, cache_dtype: torch.dtype | None = None, capacity: int = 0
    ) -> Any:
        """The cache before the first position; arguments as `Mixer.init_cache`."""
        cache = self.mixer.init_cache(batch_size, cache_dtype=cache_dtype, capacity=capacity)
        if self.short_convolution is None:
            return cache
        # Weights that are stored for decoding are buffers.
        device = next(iter(self.mixer.state_dict().values())).device
        before = self.short_convolution.kernel_size - 1
        return torch.zeros(batch_size, before, self.mixer.d_model, device=device), cache

    def extend(self, x: Stream, cache: Any) -> tuple[Stream, Any]:
        """The next T positions after those in `cache`: equals `forward` on the whole sequence."""
        if self.short_convolution is None:
            y, cache = self.mixer.extend(x, cache)
            return self.feed_forward(x + y), cache
        h, before = self.short_convolution.extend(x, cache[0])
        y, cache = self.mixer.extend(h, cache[1])
        return self.feed_forward(x + y), (before, cache)

    def cache_bytes(self, length: int, cache_dtype: torch.dtype = torch.float32) -> int:
        """Bytes of cache of one sequence of `length` positions, with float32 weights."""
        before = 0 if self.short_convolution is None else self.short_convolution.kernel_size - 1
        return 4 * before * self.mixer.d_model + self.mixer.cache_bytes(length, cache_dtype)


def rename_former_keys(block: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Renames the weights of former versions, in which a short convolution was a mixer around the mixer."""
    former = f"{prefix}mixer.mixer."
    if not any(key.startswith(former) for key in state_dict):
        return
    for key in [key for key in state_dict if key.startswith(f"{prefix}mixer.")]:
        part = "mixer." if key.startswith(former) else "short_convolution."
        inner = key.removeprefix(former).removeprefix(f"{prefix}mixer.")
        state_dict[f"{prefix}{part}{inner}"] = state_dict.pop(key)
