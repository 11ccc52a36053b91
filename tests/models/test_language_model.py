"""Every mixer: official parameter counts, causality by gradient, step by step equals forward, description."""

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import (
    MLP,
    LanguageModel,
    LinearAttention,
    LinearRelation,
    Mixer,
    QuadraticRelation,
    QuadraticRelationScaledHeads,
    QuadraticRelationWithoutPostNorm,
    SoftmaxAttention,
    build,
    describe,
)

MIXERS = {
    "quadratic": lambda causal: QuadraticRelation(8, 12, causal=causal),
    "quadratic two heads": lambda causal: QuadraticRelation(8, 12, n_heads=2, causal=causal),
    "quadratic relu approx": lambda causal: QuadraticRelation(
        8, 12, causal=causal, pre_norm="approx", activation="relu"
    ),
    "quadratic scaled heads": lambda causal: QuadraticRelationScaledHeads(
        8, 12, n_heads=2, causal=causal, eps=1e-2
    ),
    "quadratic no post-norm": lambda causal: QuadraticRelationWithoutPostNorm(8, 12, causal=causal),
    "linear": lambda causal: LinearRelation(8, 12, causal=causal),
    "linear rms two heads": lambda causal: LinearRelation(8, 12, n_heads=2, causal=causal, norm="rms"),
    "softmax attention": lambda causal: SoftmaxAttention(8, n_heads=2, causal=causal),
    "linear attention": lambda causal: LinearAttention(8, n_heads=2, causal=causal),
}


def make_model(mixer: Mixer) -> LanguageModel:
    mlp = MLP(8, 16) if isinstance(mixer, SoftmaxAttention) else None
    return LanguageModel(mixer, vocab_size=11, n_layers=2, max_length=16, mlp=mlp)


@pytest.fixture(params=MIXERS)
def make_mixer(request: pytest.FixtureRequest):
    return MIXERS[request.param]


@pytest.mark.parametrize(
    ("mixer", "mlp", "expected"),
    [
        (QuadraticRelation(192, 192), None, 1_337_280),
        (LinearRelation(192, 192), None, 1_337_280),
        (SoftmaxAttention(192), MLP(192, 768), 5_325_504),
        (LinearAttention(192), MLP(192, 768), 5_325_504),
    ],
    ids=["quadratic", "linear", "transformer", "linear transformer"],
)
def test_official_parameter_counts(mixer: Mixer, mlp: MLP | None, expected: int) -> None:
    model = LanguageModel(mixer, vocab_size=29, n_layers=12, max_length=34, mlp=mlp)
    counted = [p for name, p in model.named_parameters() if "embedding" not in name]
    assert sum(p.numel() for p in counted) == expected


def test_official_initialisation() -> None:
    relation = LanguageModel(QuadraticRelation(192, 192), vocab_size=29, n_layers=12, max_length=34)
    transformer = LanguageModel(
        SoftmaxAttention(192), vocab_size=29, n_layers=12, max_length=34, mlp=MLP(192, 768)
    )
    deviations = {
        "token_embedding.weight": 1.0,
        "position_embedding.weight": 1.0,
        "head.weight": 0.02,
        "blocks.3.mixer.q_proj.weight": 0.02,
        "blocks.3.mixer.k_proj.weight": 0.02,
        "blocks.3.mixer.qkv_proj.weight": 0.02,
        "blocks.3.mlp.fc_1.weight": 0.02,
    }
    for model, n_branches in ((relation, 12), (transformer, 24)):
        residual = {"blocks.3.mixer.out_proj.weight", "blocks.3.mlp.fc_2.weight"}
        for name, parameter in model.named_parameters():
            if name in residual or name in deviations:
                expected = 0.02 / n_branches**0.5 if name in residual else deviations[name]
                assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            elif name.endswith("bias"):
                assert not parameter.any(), name
    weights = dict(relation.named_parameters())
    assert "blocks.0.mixer.k_proj.bias" not in weights
    first, second = (weights[f"blocks.{i}.mixer.q_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_no_gradient_from_the_future(make_mixer) -> None:
    x = torch.randn(1, 7, 8, requires_grad=True)
    mixer = make_mixer(True)
    mixer.reset_parameters(1)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 3].square().sum(), x)
    assert not gradient[0, 4:].any()
    assert gradient[0, :4].any(-1).all()


def test_bidirectional_sees_everything(make_mixer) -> None:
    x = torch.randn(1, 7, 8, requires_grad=True)
    mixer = make_mixer(False)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 3].square().sum(), x)
    assert gradient[0].any(-1).all()
    with pytest.raises(ValueError, match="causal=False"):
        mixer.init_state(1)


@pytest.mark.parametrize("parts", [[1] * 9, [4, 1, 1, 3], [9]], ids=str)
def test_part_by_part_equals_forward(make_mixer, parts: list[int]) -> None:
    model = make_model(make_mixer(True)).eval()
    tokens = torch.randint(11, (3, 9))
    state = model.init_state(3)
    outputs = []
    with torch.no_grad():
        for part in tokens.split(parts, dim=1):
            logits, state = model.extend(part, state)
            outputs.append(logits)
        assert_close(torch.cat(outputs, 1), model(tokens), atol=1e-5, rtol=1e-5)


def test_single_step_equals_forward(make_mixer) -> None:
    mixer = make_mixer(True)
    x = torch.randn(2, 5, 8)
    state = mixer.init_state(2)
    with torch.no_grad():
        for i in range(5):
            y, state = mixer.step(x[:, i], state)
            assert_close(y, mixer(x)[:, i], atol=1e-5, rtol=1e-5)


def test_state_size_grows_only_where_it_must() -> None:
    for name, make in MIXERS.items():
        model = make_model(make(True))
        grows = model.state_size(1000) > model.state_size(10)
        assert grows == ("quadratic" in name or "softmax" in name), name
    assert make_model(QuadraticRelation(8, 12)).state_size(1000) == 2 * 1000 * 12 * 4


def test_description_rebuilds_the_model(make_mixer) -> None:
    model = make_model(make_mixer(True))
    rebuilt = build(describe(model))
    rebuilt.load_state_dict(model.state_dict())
    tokens = torch.randint(11, (2, 6))
    assert torch.equal(rebuilt(tokens), model(tokens))
    assert describe(rebuilt) == describe(model)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"class_path": "causalrn.models.NoSuch"}, "NoSuch"),
        ({"class_path": "os.getcwd"}, "no network"),
        (
            {"class_path": "causalrn.models.MLP", "init_args": {"d_model": 4, "d_hidden": 4, "width": 3}},
            "width",
        ),
        ({}, "cannot be imported"),
    ],
)
def test_wrong_description_is_named(description: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(description)


def test_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="d_hidden=10, n_heads=4"):
        QuadraticRelation(8, 10, n_heads=4)


def test_length_above_learned_positions_is_named() -> None:
    model = make_model(LinearRelation(8, 12))
    with pytest.raises(ValueError, match="17 positions.*max_length=16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_linear_attention_in_parts_equals_the_whole() -> None:
    mixer = LinearAttention(8, n_heads=2)
    x = torch.randn(2, 3 * mixer.PART + 5, 8)
    whole, _ = mixer.mix(x, None)
    assert_close(mixer(x), whole, atol=1e-5, rtol=1e-5)
