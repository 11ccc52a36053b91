"""The interface that every sequence mixer shares: whole sequences in training, part by part in decoding."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalrn.system import check_range

# The residual stream, or a branch of it.
Stream = Float[Tensor, "B T C"]


class Mixer(nn.Module, ABC):
    """One residual branch that mixes positions; the language model adds its output to the stream.

    A mixer is constructed once, as a prototype, and copied per layer; `reset_parameters` then draws each
    copy's own initial values.

    Args:
        d_model: width C of the residual stream.
        causal: whether a position sees only itself and the positions before it.

    Raises:
        ValueError: no channels.
    """

    def __init__(self, d_model: int, causal: bool) -> None:
        super().__init__()
        check_range(self, "[1, inf)", d_model=d_model)
        self.d_model = d_model
        self.causal = causal

    @abstractmethod
    def reset_parameters(self, n_branches: int) -> None:
        """Draws the initial values; output projections shrink with the model's number of residual branches."""

    @abstractmethod
    def forward(self, x: Stream) -> Stream:
        """Mixes a whole sequence."""

    @abstractmethod
    def init_cache(
        self, batch_size: int, *, cache_dtype: torch.dtype | None = None, capacity: int = 0
    ) -> Any:
        """The cache before the first position: tensors whose first axis is the batch, and growing caches.

        Args:
            batch_size: number of rows.
            cache_dtype: of what grows with the length (the relation's k, attention's k and v); as computed if None.
            capacity: positions to make room for at once, where the final length is known.

        Raises:
            ValueError: the mixer is bidirectional, so that no position is final before the last one came.
        """

    @abstractmethod
    def extend(self, x: Stream, cache: Any) -> tuple[Stream, Any]:
        """Mixes the next T positions after those in `cache`: equals `forward` on the whole sequence.

        The passed cache must not be used again: its memory may be reused for the returned one.
        """

    def step(self, x: Float[Tensor, "B C"], cache: Any) -> tuple[Float[Tensor, "B C"], Any]:
        """Mixes the one next position."""
        y, cache = self.extend(x[:, None], cache)
        return y[:, 0], cache

    @abstractmethod
    def cache_bytes(self, length: int, cache_dtype: torch.dtype = torch.float32) -> int:
        """Bytes of cache that one sequence of `length` positions needs, with float32 weights."""

    def check_causal(self) -> None:
        if not self.causal:
            raise ValueError(f"{type(self).__name__}(causal=False) has no cache; want causal=True")


def check_heads(d_hidden: int, n_heads: int) -> None:
    """Raises a ValueError unless the heads divide the channels."""
    if n_heads < 1 or d_hidden % n_heads:
        raise ValueError(f"d_hidden must be divisible by n_heads: got d_hidden={d_hidden}, n_heads={n_heads}")


def given(module: nn.Module, **setting: int | None) -> int:
    """The one setting that is passed, which only a config may leave out, see `causalrn.training.config_values`.

    Raises:
        ValueError: it is None.
    """
    [(name, value)] = setting.items()
    if value is None:
        raise ValueError(f"{type(module).__name__}: {name} is missing")
    return value


def normal_linear_(linear: nn.Linear, std: float) -> None:
    """Weights from N(0, std), bias 0: the initialisation of every official projection."""
    torch.nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        torch.nn.init.zeros_(linear.bias)
