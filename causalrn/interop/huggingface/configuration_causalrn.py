"""Configuration of a CausalRN language model in the Hugging Face format; copied into every exported folder."""

from typing import Any

from transformers import PretrainedConfig


class CausalRNConfig(PretrainedConfig):
    """A network as causalrn describes it, plus the names under which other tools look for its sizes.

    Args:
        network: {"class_path": ..., "init_args": {...}}, nested for the mixer and the MLP, as in a causalrn checkpoint.

    Raises:
        ValueError: the network tells positions apart in a way that the modelling code does not know.
    """

    model_type = "causalrn"

    def __init__(self, network: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs["tie_word_embeddings"] = False
        if network is not None:
            settings = network["init_args"]
            mixer = settings["mixer"]["init_args"]
            while "mixer" in mixer:
                mixer = mixer["mixer"]["init_args"]
            kwargs["vocab_size"] = settings["vocab_size"]
            kwargs["hidden_size"] = mixer["d_model"]
            kwargs["num_hidden_layers"] = settings["n_layers"]
            kwargs["num_attention_heads"] = mixer["n_heads"]
            kwargs["max_position_embeddings"] = settings["max_length"]
            # Checkpoints of before there were other positions do not name them.
            terms = {"positions": settings.get("positions")}
            terms |= {name: mixer.get(name) for name in ("rotary", "gain", "bias")}
            for name, term in terms.items():
                if term is not None:
                    kind = term["class_path"].rpartition(".")[2]
                    raise ValueError(f"no Hugging Face form of {name} {kind!r}; want learned positions alone")
        self.network = network
        super().__init__(**kwargs)
