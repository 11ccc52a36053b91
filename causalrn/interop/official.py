"""State dicts of the official code (kerner-lab/causal-relation-networks) as networks of ours."""

import re
from typing import Any

from torch import Tensor

from causalrn.models.description import build
from causalrn.models.language_model import LanguageModel
from causalrn.models.mixer import check_heads

# Official key -> ours; {} stands for the layer.
COMMON = {
    "pre_block.wte.weight": "token_embedding.weight",
    "pre_block.wpe.weight": "position_embedding.weight",
    "post_block.fc_cls.weight": "head.weight",
}
RELATION = {
    "fc_1.weight": "mixer.q_proj.weight",
    "fc_1.bias": "mixer.q_proj.bias",
    "fc_2.weight": "mixer.k_proj.weight",
    "fc_3.weight": "mixer.out_proj.weight",
    "fc_3.bias": "mixer.out_proj.bias",
}
TRANSFORMER = {
    "attn.fc_1.weight": "mixer.qkv_proj.weight",
    "attn.fc_2.weight": "mixer.out_proj.weight",
    **{f"mlp.fc_{i}.{kind}": f"mlp.fc_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
}
BUFFERS = ("pre_block.pos", "attn.causal_mask")
MODELS = (
    "relation",
    "linear_relation",
    "relation_ablation",
    "transformer",
    "linear_transformer",
)


def describe_official(state_dict: dict[str, Tensor], model: str, **settings: Any) -> dict[str, Any]:
    """The description (see `causalrn.models.describe`) of the network that a state dict belongs to.

    Sizes are read off the weights; what they cannot tell is given.

    Args:
        state_dict: as the official code saves it.
        model: one of `MODELS`, the official `model_name` in small letters; the state dict of a linear and of
            a quadratic relation network look alike.
        settings: `n_heads`, `causal`, `norm`, `eps` (0 if not given, as in the official config) and, for
            relation_ablation, `pre_norm`, `activation`, `post_norm` (bool).

    Raises:
        ValueError: an unknown model, a state dict of another one, or settings under which the official model has no
            equal here.
    """
    if model not in MODELS:
        raise ValueError(f"official model must be one of {', '.join(MODELS)}: got {model!r}")
    weights = clean_keys(state_dict)
    is_transformer = model in ("transformer", "linear_transformer")
    layers = {int(match[1]) for key in weights if (match := re.match(r"block_all\.(\d+)\.", key))}
    # Tells the number of hidden channels.
    probe = "block_all.0.mlp.fc_1.weight" if is_transformer else "block_all.0.fc_1.weight"
    needed = [*COMMON, probe]
    if missing := [key for key in needed if key not in weights]:
        raise ValueError(f"state dict is of no official {model}: it has no {missing[0]}")
    vocab_size, d_model = weights["pre_block.wte.weight"].shape
    eps = settings.pop("eps", 0.0)
    norm = {"norm": settings.pop("norm", "layer"), "eps": eps}
    shared = {
        "d_model": d_model,
        "n_heads": settings.pop("n_heads", 1),
        "causal": settings.pop("causal", True),
    }
    mlp = None
    if is_transformer:
        mixer_class = "SoftmaxAttention" if model == "transformer" else "LinearAttention"
        mlp = class_description("MLP", d_model=d_model, d_hidden=weights[probe].shape[0], **norm)
    else:
        shared["d_hidden"] = weights[probe].shape[0]
        check_heads(shared["d_hidden"], shared["n_heads"])
        mixer_class, changed = describe_relation(model, shared, eps, settings)
        shared |= changed
    if settings:
        raise ValueError(f"setting {min(settings)!r} does not apply to the official {model}")
    return class_description(
        "LanguageModel",
        mixer=class_description(mixer_class, **shared, **norm),
        vocab_size=vocab_size,
        n_layers=len(layers),
        max_length=weights["pre_block.wpe.weight"].shape[0],
        mlp=mlp,
        **norm,
    )


def describe_relation(
    model: str, shared: dict[str, Any], eps: float, settings: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Class of a relation mixer, and its arguments beside or in place of the shared ones; takes from `settings`."""
    if model == "linear_relation":
        if eps:
            raise ValueError(
                f"official linear_relation adds eps to rows of another scale than LinearRelation: want eps=0, got {eps}"
            )
        # Its norms run over all heads together.
        return "LinearRelation", {"n_heads": 1}
    if not shared["causal"]:
        raise ValueError(
            f"official {model} is causal whatever enable_causal_mode says: want causal=True (no --bidirectional)"
        )
    if model == "relation":
        # A factor per head and position, which the post-norm erases from one head without eps.
        scaled = shared["n_heads"] > 1 or eps
        return "QuadraticRelationScaledHeads" if scaled else "QuadraticRelation", {}
    mixer_class = "QuadraticRelation" + ("" if settings.pop("post_norm", True) else "WithoutPostNorm")
    activation = settings.pop("activation", "exp")
    changed = {
        "activation": "official_elu" if activation == "elu" else activation,
        "pre_norm": settings.pop("pre_norm", "exact"),
    }
    if changed["pre_norm"] == "approx":
        # It runs over all heads together, and after it each channel is summed alone.
        changed["n_heads"] = 1
    return mixer_class, changed


def from_official(state_dict: dict[str, Tensor], description: dict[str, Any]) -> LanguageModel:
    """The network of `description` with the weights of an official state dict.

    Raises:
        ValueError: a key that is missing or left over, or a shape that does not fit.
    """
    network = build(description)
    assert isinstance(network, LanguageModel)
    try:
        network.load_state_dict(convert_keys(clean_keys(state_dict)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"official state dict does not fit the description: {reason}") from error
    return network


def class_description(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"causalrn.models.{name}", "init_args": init_args}


def clean_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights alone: without the prefix of torch.compile, without buffers."""
    clean = {key.removeprefix("_orig_mod."): tensor for key, tensor in state_dict.items()}
    return {key: tensor for key, tensor in clean.items() if not key.endswith(BUFFERS)}


def convert_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the official keys; unknown ones stay, so that loading reports them."""
    converted = {}
    for key, tensor in weights.items():
        if match := re.fullmatch(r"block_all\.(\d+)\.(.+)", key):
            inner = {**RELATION, **TRANSFORMER}.get(match[2], match[2])
            converted[f"blocks.{match[1]}.{inner}"] = tensor
        else:
            converted[COMMON.get(key, key)] = tensor
    return converted
