"""Official state dicts give the official logits and gradients, for every model and every ablation."""

import itertools
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from causalrn.models.official import convert_keys, describe_official, from_official
from tests.models.official_reference import make_state_dict, official_logits

ABLATIONS = [
    ("relation_ablation", {"pre_norm": pre_norm, "activation": activation, "post_norm": post_norm, **more})
    for pre_norm, activation, post_norm in itertools.product(
        ("exact", "approx", "none"), ("exp", "relu", "elu"), (True, False)
    )
    for more in ({}, {"norm": "rms"})
]
CASES = [
    *((model, {}) for model in ("relation", "linear_relation", "transformer", "linear_transformer")),
    *((model, {"norm": "rms"}) for model in ("relation", "linear_relation", "transformer")),
    *(
        (model, {"causal": False})
        for model in ("relation", "linear_relation", "transformer", "linear_transformer")
    ),
    *((model, {"n_heads": 2}) for model in ("relation", "transformer", "linear_transformer")),
    *ABLATIONS,
]


@pytest.mark.parametrize(("model", "settings"), CASES, ids=str)
def test_logits_and_gradients_equal_the_official_ones(model: str, settings: dict[str, Any]) -> None:
    weights = {
        key: tensor.requires_grad_() if tensor.is_floating_point() and "mask" not in key else tensor
        for key, tensor in make_state_dict(model).items()
    }
    tokens = torch.randint(11, (3, 10))
    expected = official_logits(weights, tokens, model, **settings)
    network = from_official(weights, describe_official(weights, model, **settings))
    logits = network(tokens)
    # Without any norm the exponentials of the sums are large; the bound is relative to them.
    scale = max(1.0, expected.abs().max().item())
    assert_close(logits / scale, expected / scale, atol=1e-5, rtol=0)

    probe = torch.randn_like(expected) / scale
    (expected * probe).sum().backward()
    (logits * probe).sum().backward()
    parameters = dict(network.named_parameters())
    for key, tensor in convert_keys({k: w for k, w in weights.items() if w.requires_grad}).items():
        gradient = parameters[key].grad
        assert gradient is not None
        assert tensor.grad is not None
        size = max(1.0, tensor.grad.abs().max().item())
        assert_close(
            gradient / size, tensor.grad / size, atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_compiled_prefix_is_understood() -> None:
    weights = make_state_dict("relation")
    prefixed = {f"_orig_mod.{key}": tensor for key, tensor in weights.items()}
    description = describe_official(prefixed, "relation")
    assert_close(
        from_official(prefixed, description).head.weight.detach(), weights["post_block.fc_cls.weight"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("pre_block.wte.weight"), "no pre_block.wte.weight"),
        (lambda w: w.pop("block_all.1.fc_3.bias"), "blocks.1.mixer.out_proj.bias"),
        (lambda w: w.update({"block_all.0.extra": torch.ones(1)}), "blocks.0.extra"),
    ],
)
def test_foreign_state_dict_is_named(change: Any, message: str) -> None:
    weights = make_state_dict("relation")
    change(weights)
    with pytest.raises(ValueError, match=message):
        from_official(weights, describe_official(weights, "relation"))


def test_setting_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="activation"):
        describe_official(make_state_dict("relation"), "relation", activation="elu")
