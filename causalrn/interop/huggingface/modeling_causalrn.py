"""CausalRN language models for transformers; copied into every exported folder, where it stands alone.

See "An All-MLP Sequence Modeling Architecture That Excels at Copying", arXiv 2406.16168. Letters: B batch, T new
positions, S all positions so far, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_causalrn import CausalRNConfig
from .mixers_causalrn import MIXERS, MLP, Block, normalise


class CausalRNCache:
    """Each layer's mixer state, and the number of positions it stands for."""

    is_compileable = False

    def __init__(self, n_layers: int) -> None:
        self.layers: list[tuple[Tensor, ...] | None] = [None] * n_layers
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the rows that beam search goes on with."""
        self.layers = [state and tuple(part[beam_idx] for part in state) for state in self.layers]


class CausalRNForCausalLM(PreTrainedModel, GenerationMixin):
    """Token and learned position embeddings, blocks, and a linear head on the normalised stream."""

    config_class = CausalRNConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012
    # No earlier state can be restored: it is added up (linear forms) or grows in place.
    _is_stateful = True

    def __init__(self, config: CausalRNConfig) -> None:
        super().__init__(config)
        assert config.network is not None
        settings = config.network["init_args"]
        mixer, mlp = settings["mixer"], settings["mlp"]
        mixer_name = mixer["class_path"].rpartition(".")[2]
        if mixer_name not in MIXERS:
            raise ValueError(f"no Hugging Face form of mixer {mixer_name!r}; want one of {', '.join(MIXERS)}")
        self.norm, self.eps = settings["norm"], settings["eps"]
        d_model = mixer["init_args"]["d_model"]
        self.token_embedding = nn.Embedding(settings["vocab_size"], d_model)
        self.position_embedding = nn.Embedding(settings["max_length"], d_model)
        self.blocks = nn.ModuleList(
            Block(MIXERS[mixer_name](mixer["init_args"]), None if mlp is None else MLP(mlp["init_args"]))
            for _ in range(settings["n_layers"])
        )
        self.head = nn.Linear(d_model, settings["vocab_size"], bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # The first forward pass makes a CausalRNCache instead.
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
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
        """Logits of the next token, (B, T, V).

        Args:
            input_ids: the T new tokens, (B, T).
            attention_mask: 0 at padding, (B, S) with the positions in the cache; pad on the left to generate.
            position_ids: of the new tokens; counted without the padding by default.
            past_key_values: state after the tokens before these.
            inputs_embeds: vectors in place of the tokens' embeddings, (B, T, C); positions are added to them.
            labels: tokens to predict (shifted here), -100 where there is none.
            use_cache: return the state after these tokens.
            output_attentions: refused, as there are no attention weights.
            output_hidden_states: return n_layers + 1 tensors (B, T, C): the embeddings and the stream after each block,
                the last one normalised as the head reads it.
            return_dict: False for a tuple of what is not None.
            logits_to_keep: how many positions at the end, or which, to compute logits of; 0 for all.
            kwargs: for the loss, as num_items_in_batch.

        Raises:
            ValueError: neither or both of tokens and vectors, a position at or above max_position_embeddings, or
                attention weights are asked for.
        """
        if self.setting("output_attentions", output_attentions):
            raise ValueError("a CausalRN has no attention weights; want output_attentions=False")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("want either input_ids or inputs_embeds: got both or neither")
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if past_key_values is None else past_key_values.length
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if int(position_ids.max()) >= self.config.max_position_embeddings:
            raise ValueError(
                f"position {int(position_ids.max())} is beyond the model's learned positions: "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        cache = CausalRNCache(len(self.blocks)) if past_key_values is None else past_key_values
        x = x + self.position_embedding(position_ids)
        streams = []
        for index, block in enumerate(self.blocks):
            streams.append(x)
            x, cache.layers[index] = block(x, cache.layers[index], attention_mask)
        cache.length = past + x.shape[1]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(normalise(x[:, kept], self.norm, self.eps))
        hidden_states = None
        if self.setting("output_hidden_states", output_hidden_states):
            hidden_states = (*streams, normalise(x, self.norm, self.eps))
        loss = None
        if labels is not None:
            # That of transformers, whose Trainer divides by the tokens of all accumulated batches.
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        kept_state: Any = cache if use_cache or use_cache is None else None
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=kept_state, hidden_states=hidden_states
        )
        return output if self.setting("return_dict", return_dict) else output.to_tuple()

    def setting(self, name: str, given: bool | None) -> bool:
        """The given value, or the config's."""
        return getattr(self.config, name) if given is None else given
