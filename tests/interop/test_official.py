"""Official state dicts give the official logits and gradients, for every model and every ablation."""

import itertools
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from causalrn.interop.official import convert_keys, describe_official, from_official
from tests.interop.official_reference import make_state_dict, official_logits

HEADS = (1, 2, 4)
NORMS = ("layer", "rms")
# The official default, and one large enough that the rows it is added to must have the official scale.
EPS = (0.0, 1e-2)


def combine(**choices: Any) -> list[dict[str, Any]]:
    """Settings with every combination of the given values."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


PRE_NORMS, ACTIVATIONS = ("exact", "approx", "none"), ("exp", "relu", "elu")
CASES = [
    *(("relation", settings) for settings in combine(n_heads=HEADS, norm=NORMS, eps=EPS)),
    *(
        (model, settings)
        for model in ("linear_relation", "transformer", "linear_transformer")
        for settings in combine(n_heads=HEADS, norm=NORMS, causal=(True, False))
    ),
    *(
        ("relation_ablation", settings)
        for settings in combine(
            pre_norm=PRE_NORMS, activation=ACTIVATIONS, post_norm=(True, False), n_heads=HEADS, norm=NORMS
        )
    ),
    *((model, {"eps": EPS[1]}) for model in ("transformer", "linear_transformer")),
    *(
        ("relation_ablation", settings)
        for settings in combine(pre_norm=PRE_NORMS, activation=ACTIVATIONS, n_heads=(2,), eps=EPS[1:])
    ),
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
        (lambda w: w.pop("block_all.0.fc_1.weight"), "no block_all.0.fc_1.weight"),
        (lambda w: w.pop("block_all.1.fc_3.bias"), "blocks.1.mixer.out_proj.bias"),
        (lambda w: w.update({"block_all.0.extra": torch.ones(1)}), "blocks.0.extra"),
    ],
)
def test_foreign_state_dict_is_named(change: Any, message: str) -> None:
    weights = make_state_dict("relation")
    change(weights)
    with pytest.raises(ValueError, match=message):
        from_official(weights, describe_official(weights, "relation"))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("relation", {"activation": "elu"}, "activation"),
        # The official block is causal in both modes.
        ("relation", {"causal": False}, "want causal=True"),
        ("relation_ablation", {"causal": False}, "want causal=True"),
        ("linear_relation", {"eps": 1e-5}, "want eps=0, got 1e-05"),
        # Each of these heads would be ignored.
        ("linear_relation", {"n_heads": 5}, "n_heads=5"),
        ("relation_ablation", {"n_heads": 5, "pre_norm": "approx"}, "n_heads=5"),
    ],
    ids=str,
)
def test_settings_without_an_equal_are_refused(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_official(make_state_dict(model), model, **settings)


def test_one_head_stays_the_plain_relation() -> None:
    weights = make_state_dict("relation")
    classes = {
        (n_heads, eps): describe_official(weights, "relation", n_heads=n_heads, eps=eps)["init_args"][
            "mixer"
        ]["class_path"]
        for n_heads, eps in ((1, 0.0), (1, 1e-5), (2, 0.0))
    }
    plain, scaled = "causalrn.models.QuadraticRelation", "causalrn.models.QuadraticRelationScaledHeads"
    assert classes == {(1, 0.0): plain, (1, 1e-5): scaled, (2, 0.0): scaled}
