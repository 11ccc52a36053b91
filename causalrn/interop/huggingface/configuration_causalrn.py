"""Configuration of a CausalRN language model in the Hugging Face format; copied into every exported folder."""

from typing import Any

from transformers import PretrainedConfig


class CausalRNConfig(PretrainedConfig):
    """A network as causalrn describes it, plus the names under which other tools look for its sizes.

    Args:
        network: {"class_path": ..., "init_args": {...}}, nested for its parts, as in a causalrn checkpoint.
    """

    model_type = "causalrn"

    def __init__(self, network: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs["tie_word_embeddings"] = False
        if network is not None:
            settings = network["init_args"]
            # Where mixers alternate, the first one speaks for all.
            mixer = settings["mixer"][0] if isinstance(settings["mixer"], list) else settings["mixer"]
            kwargs["vocab_size"] = settings["vocab_size"]
            kwargs["hidden_size"] = mixer["init_args"]["d_model"]
            kwargs["num_hidden_layers"] = settings["n_layers"]
            kwargs["num_attention_heads"] = mixer["init_args"]["n_heads"]
            kwargs["max_position_embeddings"] = settings["max_length"]
        self.network = network
        super().__init__(**kwargs)
