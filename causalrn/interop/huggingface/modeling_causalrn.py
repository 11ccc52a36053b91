"""CausalRN language models for transformers; copied into every exported folder, where it stands alone.

It holds no mathematics: the networks are those of causalrn where that is installed, with its compiled kernels, and else those
of `networks_causalrn.py`, which are made from the same sources. See "An All-MLP Sequence Modeling Architecture That Excels at
Copying", arXiv 2406.16168. Letters: B batch, T new positions, S all positions so far, C residual width, V vocabulary.
"""

import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_causalrn import CausalRNConfig

try:
    from causalrn.models import LanguageModel, PairBias, build
    from causalrn.models.cache import join_rows, select_rows
except ImportError:
    from .networks_causalrn import (  # pyright: ignore[reportMissingImports]
        LanguageModel,
        PairBias,
        build,
        join_rows,
        select_rows,
    )


class CausalRNCache:
    """The cache of all rows.

    Attributes:
        blocks: the cache of each block; rows have as many positions as they have real tokens.
        positions: real tokens of each row, (B,).
        length: positions with the padding, which is how transformers counts.
    """

    is_compileable = False

    def __init__(self, blocks: list[Any], positions: Tensor, length: int) -> None:
        self.blocks = blocks
        self.positions = positions
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the rows that beam search goes on with."""
        self.blocks = select_rows(self.blocks, beam_idx)
        self.positions = self.positions[beam_idx]


class CausalRNForCausalLM(PreTrainedModel, GenerationMixin):
    """A network of causalrn behind the interface of transformers."""

    config_class = CausalRNConfig
    main_input_name = "input_ids"
    network: LanguageModel
    _no_split_modules = ["Block"]  # noqa: RUF012
    # No earlier cache can be restored: it is added up (linear forms) or grows in place.
    _is_stateful = True

    def __init__(self, config: CausalRNConfig) -> None:
        super().__init__(config)
        # The classes are those beside `build`, wherever that stands.
        home = build.__module__.removesuffix("description")[:-1]
        text = json.dumps(config.network).replace('"causalrn.models.', f'"{home}.')
        network = build(json.loads(text))
        assert isinstance(network, LanguageModel)
        self.network = network
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # No file holds these buffers: they follow from the settings.
        if isinstance(module, PairBias):
            bias: Any = module
            bias.fill_buffers()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The first forward pass makes a CausalRNCache instead.
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.network.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.network.token_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.network.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.network.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: CausalRNCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token, (B, T, V); what they are at padding means nothing.

        Args:
            input_ids: the T new tokens, (B, T).
            attention_mask: 0 at padding, (B, S) with the positions in the cache; pad on the left to generate.
            past_key_values: what the tokens before these left.
            inputs_embeds: vectors in place of the tokens' embeddings, (B, T, C); positions are added to them.
            labels: tokens to predict (shifted here), -100 where there is none.
            use_cache: return what the next tokens need; by default, where the network can and is not in training.
            output_attentions: refused, as there are no attention weights.
            output_hidden_states: return n_layers + 1 tensors (B, T, C): the embeddings and the stream after each block,
                the last one normalised as the head reads it.
            return_dict: False for a tuple of what is not None.
            logits_to_keep: how many positions at the end, or which, to compute logits of; 0 for all.
            kwargs: for the loss, as num_items_in_batch.

        Raises:
            ValueError: neither or both of tokens and vectors, positions of the caller's own, more positions than the network
                has, attention weights, or a cache of a network that has none.
        """
        if self.setting("output_attentions", output_attentions):
            raise ValueError("a CausalRN has no attention weights; want output_attentions=False")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("want either input_ids or inputs_embeds: got both or neither")
        if kwargs.pop("position_ids", None) is not None:
            raise ValueError("positions are counted from attention_mask; want no position_ids")
        vectors = self.network.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        streams, cache = self.run(vectors, attention_mask, past_key_values, self.keeps_cache(use_cache))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.network.unembed(streams[-1][:, kept])
        hidden_states = None
        if self.setting("output_hidden_states", output_hidden_states):
            hidden_states = (*streams[:-1], self.network.last_norm(streams[-1]))
        loss = None
        if labels is not None:
            # The loss of transformers, whose Trainer divides by the tokens of all accumulated batches.
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        kept_cache: Any = cache
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=kept_cache, hidden_states=hidden_states
        )
        return output if self.setting("return_dict", return_dict) else output.to_tuple()

    def run(
        self, vectors: Tensor, mask: Tensor | None, past: CausalRNCache | None, keep: bool
    ) -> tuple[list[Tensor], CausalRNCache | None]:
        """The stream before each block and after the last one, each (B, T, C), and the cache where it is to be kept."""
        batch, length = vectors.shape[:2]
        real = torch.ones(batch, length, dtype=torch.bool, device=vectors.device)
        if mask is not None:
            real = mask[:, -length:].bool()
        if past is not None:
            if not bool(real.all()):
                raise ValueError("padding behind cached positions; want it before the first token of a row")
            return self.go_on(vectors, past)
        if not keep and self.network.layers[0].mixer.causal and is_on_the_right(real):
            # No real token sees what stands to the right of it.
            return self.run_blocks(vectors, 0, None)[0], None
        counts = real.sum(1)
        rows: list[Tensor] = []
        found: list[tuple[list[Tensor], Any]] = []
        # Rows of one length at a time, without their padding: each is computed as it would be alone.
        for count in counts.unique().tolist():
            members = (counts == count).nonzero()[:, 0]
            # A row of padding alone reads one position, so that it has a cache like every other.
            places = real[members].int().argsort(dim=1, stable=True)[:, length - max(count, 1) :]
            inner = vectors[members[:, None], places]
            new = [block.init_cache(len(members)) for block in self.network.layers] if keep else None
            streams, caches = self.run_blocks(inner, 0, new)
            if len(members) == batch and inner.shape[1] == length:
                return streams, CausalRNCache(caches, counts, length) if keep else None
            whole = [stream.new_zeros(len(members), length, stream.shape[2]) for stream in streams]
            lines = torch.arange(len(members), device=places.device)[:, None]
            found.append(
                ([part.index_put((lines, places), x) for part, x in zip(whole, streams, strict=True)], caches)
            )
            rows.append(members)
        order = torch.cat(rows).argsort()
        streams = [torch.cat(parts)[order] for parts in zip(*(streams for streams, _ in found), strict=True)]
        if not keep:
            return streams, None
        caches = select_rows(join_rows([caches for _, caches in found]), order)
        return streams, CausalRNCache(caches, counts.clamp(min=1), length)

    def go_on(self, vectors: Tensor, past: CausalRNCache) -> tuple[list[Tensor], CausalRNCache]:
        """The next positions of every row after those in the cache, which takes them in."""
        same = bool((past.positions == past.positions[0]).all())
        steps = [vectors] if same else vectors.split(1, dim=1)
        found = []
        for step in steps:
            start = int(past.positions[0]) if same else past.positions
            streams, past.blocks = self.run_blocks(step, start, past.blocks)
            past.positions = past.positions + step.shape[1]
            past.length += step.shape[1]
            found.append(streams)
        return [torch.cat(parts, dim=1) for parts in zip(*found, strict=True)], past

    def run_blocks(self, vectors: Tensor, start: int | Tensor, caches: Any) -> tuple[list[Tensor], list[Any]]:
        """The stream before each block and after the last one, and the blocks' caches after these positions."""
        streams = [self.network.add_positions(vectors, start)]
        after = []
        for index, block in enumerate(self.network.layers):
            if caches is None:
                streams.append(block(streams[-1]))
            else:
                x, cache = block.extend(streams[-1], caches[index])
                streams.append(x)
                after.append(cache)
        return streams, after

    def keeps_cache(self, wanted: bool | None) -> bool:
        if wanted is not None:
            return wanted
        try:
            self.network.init_cache(1)
        except ValueError:
            # Bidirectional, or made for whole sequences.
            return False
        return not self.training

    def setting(self, name: str, given: bool | None) -> bool:
        """The given value, or the config's."""
        return getattr(self.config, name) if given is None else given


def is_on_the_right(real: Tensor) -> bool:
    """Whether all padding of a mask stands behind the tokens of its row."""
    return bool((real[:, 1:] <= real[:, :-1]).all())
