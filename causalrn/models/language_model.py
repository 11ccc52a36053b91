"""A language model: embeddings, a stack of residual branches around any mixer, and a linear head."""

from copy import deepcopy
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalrn.models.block import Block
from causalrn.models.mixer import Mixer, Stream, given, normal_linear_
from causalrn.models.mlp import FeedForward
from causalrn.models.positions import LearnedPositions, Positions
from causalrn.models.short_convolution import ShortFilter
from causalrn.ops import normalise
from causalrn.ops.context_parallel import position_offset
from causalrn.system import check_range


class DecodingState(NamedTuple):
    """The state of decoding.

    Attributes:
        position: number of positions seen: one number, or int64 (B,) where the rows differ.
        layers: each block's state.
    """

    position: int | Int[Tensor, " B"]
    layers: list[Any]


class LanguageModel(nn.Module):
    """Token embeddings with positions, n_layers blocks, and a head on norm(x) (official `Model`).

    The relation networks have no MLP: the mixer is the whole block. The Transformers of the paper are an
    attention mixer with an MLP.

    Args:
        mixer: prototype of the mixer, of which each layer gets its own copy with its own initial values. A list is a
            pattern: layer i gets the entry i modulo its length.
        vocab_size: number of token ids V. Only a config may leave it out: `causalrn.fit` takes it from the data then.
        n_layers: number of blocks; the paper's networks have 12.
        max_length: the longest sequence the model takes, as many learned positions it has; None for no end. A config
            with learned positions may leave it out as well.
        mlp: prototype of the position-wise branch, or None.
        norm: plain normalisation before the head, "layer" or "rms"; mixers, MLPs and short convolutions have their own.
        eps: added to the standard deviation of that normalisation.
        positions: how embeddings say where they stand; None for the paper's learned positions.
        short_convolution: prototype of the blend of each position with the few before it in front of the mixer, or None.

    Raises:
        ValueError: mixers, an MLP or a short convolution of different widths, a pattern longer than the network, more positions wanted than there are, or no tokens, layers or positions.
    """

    def __init__(
        self,
        mixer: Mixer | list[Mixer],
        vocab_size: int | None = None,
        n_layers: int = 12,
        max_length: int | None = None,
        mlp: FeedForward | None = None,
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-5,
        positions: Positions | None = None,
        short_convolution: ShortFilter | None = None,
    ) -> None:
        super().__init__()
        vocab_size = given(self, vocab_size=vocab_size)
        check_range(self, "[1, inf)", vocab_size=vocab_size, n_layers=n_layers, max_length=max_length)
        check_range(self, "[0, inf)", eps=eps)
        pattern = mixer if isinstance(mixer, list) else [mixer]
        check_pattern(pattern, n_layers)
        self.d_model = pattern[0].d_model
        for name, part in (("mlp", mlp), ("short_convolution", short_convolution)):
            width = None if part is None else part.d_model
            if width not in (None, self.d_model):
                raise ValueError(f"{name} and mixer must share d_model: got {width} and {self.d_model}")
        if positions is None and max_length is None:
            raise ValueError("learned positions end somewhere: want a max_length, or other positions")
        last = None if positions is None else positions.max_length
        if last is not None and max_length is not None and max_length > last:
            raise ValueError(f"max_length={max_length} is beyond the {last} positions of the scheme")
        self.vocab_size = vocab_size
        self.n_layers = n_layers
        self.max_length = last if max_length is None else max_length
        self.norm: Literal["layer", "rms"] = norm
        self.eps = eps
        self.pattern_length = len(pattern) if isinstance(mixer, list) else None
        self.token_embedding = nn.Embedding(vocab_size, self.d_model)
        self.has_default_positions = positions is None
        if positions is None:
            assert max_length is not None
            positions = LearnedPositions(max_length, self.d_model)
        self.position_embedding = positions
        self.blocks = nn.ModuleList(
            Block(deepcopy(short_convolution), deepcopy(pattern[layer % len(pattern)]), deepcopy(mlp))
            for layer in range(n_layers)
        )
        self.head = nn.Linear(self.d_model, vocab_size, bias=False)
        self.reset_parameters()

    @property
    def layers(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.blocks))

    @property
    def layer_names(self) -> str:
        """The mixer's class, or those of the pattern, and what stands before it: LinearRelation behind TokenShift."""
        pattern = self.layers[: self.pattern_length or 1]
        names = " + ".join(type(block.mixer).__name__ for block in pattern)
        convolution = self.short_convolution
        return names if convolution is None else f"{names} behind {type(convolution).__name__}"

    @property
    def mixer(self) -> Mixer | list[Mixer]:
        """The first layer's mixer, or those of the first pattern: the constructor's argument, by which `describe` rebuilds."""
        if self.pattern_length is None:
            return self.layers[0].mixer
        return [block.mixer for block in self.layers[: self.pattern_length]]

    @property
    def mlp(self) -> FeedForward | None:
        return self.layers[0].mlp

    @property
    def short_convolution(self) -> ShortFilter | None:
        return self.layers[0].short_convolution

    @property
    def positions(self) -> Positions | None:
        """The constructor's argument: None where the scheme follows from max_length."""
        return None if self.has_default_positions else self.position_embedding

    def reset_parameters(self) -> None:
        """Draws all initial values anew, as the official code does."""
        nn.init.normal_(self.token_embedding.weight)
        self.position_embedding.reset_parameters()
        n_branches = self.n_layers * (1 if self.mlp is None else 2)
        for block in self.layers:
            block.reset_parameters(n_branches)
        normal_linear_(self.head, 0.02)

    def embed(self, tokens: Int[Tensor, "B T"], start: int | Int[Tensor, " B"]) -> Stream:
        """Embeds T tokens that stand from position `start` (of every row, or one for each) on; see `add_positions`."""
        return self.add_positions(self.token_embedding(tokens), start)

    def add_positions(self, x: Stream, start: int | Int[Tensor, " B"]) -> Stream:
        """Embedded tokens with what tells their positions apart.

        Raises:
            ValueError: a position at or above max_length.
        """
        end = x.shape[1] + int(start if isinstance(start, int) else start.max())
        if self.max_length is not None and end > self.max_length:
            raise ValueError(
                f"sequence of {end} positions is longer than the model takes: max_length={self.max_length}"
            )
        steps = torch.arange(x.shape[1], device=x.device)
        positions = steps + (start if isinstance(start, int) else start[:, None])
        return self.position_embedding(x, positions)

    def last_norm(self, x: Stream) -> Stream:
        """The stream after the last block as the head reads it."""
        return normalise(x, self.norm, self.eps)

    def unembed(self, x: Stream) -> Float[Tensor, "B T V"]:
        return self.head(self.last_norm(x))

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position.

        Raises:
            ValueError: a sequence longer than max_length.
        """
        x = self.embed(tokens, position_offset(tokens.shape[1]))
        for block in self.layers:
            x = block(x)
        return self.unembed(x)

    def init_cache(
        self, batch_size: int, *, cache_dtype: torch.dtype | None = None, capacity: int = 0
    ) -> DecodingState:
        """The decoding state before the first token; arguments as `Mixer.init_cache`."""
        layers = [
            block.init_cache(batch_size, cache_dtype=cache_dtype, capacity=capacity) for block in self.layers
        ]
        return DecodingState(0, layers)

    def advance(self, tokens: Int[Tensor, "B T"], state: DecodingState) -> tuple[Stream, DecodingState]:
        """The residual stream after the last block at the next T positions, and the state after them.

        One call with a whole prompt is the prefill; T = 1 is a decoding step, the only one possible where the
        rows have different positions. The passed state must not be used again.
        """
        x = self.embed(tokens, state.position)
        layers = []
        for block, layer_state in zip(self.layers, state.layers, strict=True):
            x, layer_state = block.extend(x, layer_state)
            layers.append(layer_state)
        return x, DecodingState(state.position + tokens.shape[1], layers)

    def extend(
        self, tokens: Int[Tensor, "B T"], state: DecodingState
    ) -> tuple[Float[Tensor, "B T V"], DecodingState]:
        """Logits of the next T positions after those in `state`, and the state after them; see `advance`."""
        x, state = self.advance(tokens, state)
        return self.unembed(x), state

    def cache_bytes(self, length: int, cache_dtype: torch.dtype = torch.float32) -> int:
        """Bytes of decoding state of one sequence of `length` positions, with float32 weights."""
        return sum(block.cache_bytes(length, cache_dtype) for block in self.layers)


def check_pattern(pattern: list[Mixer], n_layers: int) -> None:
    """Raises a ValueError unless mixers may take turns in a network of so many layers."""
    if not 1 <= len(pattern) <= n_layers:
        raise ValueError(
            f"the pattern of mixers must have 1 to n_layers={n_layers} entries: got {len(pattern)}"
        )
    for name in ("d_model", "causal"):
        if len(values := {getattr(mixer, name) for mixer in pattern}) > 1:
            raise ValueError(f"the mixers of a network must share {name}: got {sorted(values)}")
