"""Every mixer: official parameter counts, causality by gradient, step by step equals forward, description."""

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import (
    MLP,
    LanguageModel,
    LinearAttention,
    LinearRelation,
    LogLengthGain,
    LogMeanExpRelation,
    Mixer,
    NoPositions,
    QuadraticRelation,
    QuadraticRelationScaledHeads,
    QuadraticRelationWithoutPostNorm,
    ShortConvolution,
    SoftmaxAttention,
    build,
    describe,
)
from causalrn.models.cost import Cost, forward_cost, linear_flops, mixer_cost
from causalrn.models.decoding import GREEDY, generate
from causalrn.training.checkpoint import check_same_network, load_network, save_network

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
        mixer.init_cache(1)


@pytest.mark.parametrize("parts", [[1] * 9, [4, 1, 1, 3], [9]], ids=str)
def test_part_by_part_equals_forward(make_mixer, parts: list[int]) -> None:
    model = make_model(make_mixer(True)).eval()
    tokens = torch.randint(11, (3, 9))
    state = model.init_cache(3)
    outputs = []
    with torch.no_grad():
        for part in tokens.split(parts, dim=1):
            logits, state = model.extend(part, state)
            outputs.append(logits)
        assert_close(torch.cat(outputs, 1), model(tokens), atol=1e-5, rtol=1e-5)


def test_single_step_equals_forward(make_mixer) -> None:
    mixer = make_mixer(True)
    x = torch.randn(2, 5, 8)
    state = mixer.init_cache(2)
    with torch.no_grad():
        for i in range(5):
            y, state = mixer.step(x[:, i], state)
            assert_close(y, mixer(x)[:, i], atol=1e-5, rtol=1e-5)


def test_state_size_grows_only_where_it_must() -> None:
    for name, make in MIXERS.items():
        model = make_model(make(True))
        grows = model.cache_bytes(1000) > model.cache_bytes(10)
        assert grows == ("quadratic" in name or "softmax" in name), name
    assert make_model(QuadraticRelation(8, 12)).cache_bytes(1000) == 2 * 1000 * 12 * 4


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


PATTERNS = {
    "two linear, one quadratic": lambda: [
        LinearRelation(8, 12),
        LinearRelation(8, 8),
        QuadraticRelation(8, 12),
    ],
    "attentions": lambda: [LinearAttention(8, 2), SoftmaxAttention(8)],
    "quadratic forms": lambda: [
        LogMeanExpRelation(8, 12, 2, gain=LogLengthGain(reference=5.0)),
        QuadraticRelation(8, 6, activation="relu"),
    ],
}


@pytest.fixture(params=PATTERNS)
def alternating(request: pytest.FixtureRequest) -> LanguageModel:
    model = LanguageModel(
        PATTERNS[request.param](),
        vocab_size=11,
        n_layers=4,
        positions=NoPositions(),
        mlp=MLP(8, 16),
        short_convolution=ShortConvolution(8, 3),
    )
    # Logits far enough apart that rounding decides no token.
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def test_a_pattern_repeats_over_the_layers() -> None:
    model = LanguageModel(PATTERNS["two linear, one quadratic"](), 11, n_layers=5, max_length=16)
    widths = [(type(block.mixer), block.mixer.d_hidden) for block in model.layers]
    first = [(LinearRelation, 12), (LinearRelation, 8), (QuadraticRelation, 12)]
    assert widths == [*first, *first[:2]]
    weights = model.state_dict()
    one, other = (weights[f"blocks.{layer}.mixer.q_proj.weight"] for layer in (0, 3))
    assert not torch.equal(one, other)
    assert model.layer_names == "LinearRelation + LinearRelation + QuadraticRelation"
    assert model.mixer == [block.mixer for block in model.layers[:3]]


def test_alternating_layers_see_no_future(alternating: LanguageModel) -> None:
    x = torch.randn(1, 7, 8, requires_grad=True)
    stream = x
    for block in alternating.layers:
        stream = block(stream)
    (gradient,) = torch.autograd.grad(stream[0, 3].square().sum(), x)
    assert not gradient[0, 4:].any()
    assert gradient[0, :4].any(-1).all()


@pytest.mark.parametrize("parts", [[1] * 9, [4, 1, 1, 3], [9]], ids=str)
def test_alternating_layers_decode_part_by_part(alternating: LanguageModel, parts: list[int]) -> None:
    tokens = torch.randint(11, (3, 9))
    state, outputs = alternating.init_cache(3), []
    with torch.no_grad():
        for part in tokens.split(parts, dim=1):
            logits, state = alternating.extend(part, state)
            outputs.append(logits)
        assert_close(torch.cat(outputs, 1), alternating(tokens), atol=1e-4, rtol=1e-4)


def test_alternating_layers_continue_rows_of_different_lengths(alternating: LanguageModel) -> None:
    prompts = [torch.randint(11, (length,)) for length in (9, 1, 4)]
    together = generate(alternating, prompts, 8, GREEDY)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(generate(alternating, [prompt], 8, GREEDY)[0], row)


def test_alternating_layers_train_and_rebuild(alternating: LanguageModel, tmp_path) -> None:
    tokens = torch.randint(11, (2, 9))
    alternating(tokens).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in alternating.parameters())
    save_network(alternating, tmp_path / "model.ckpt")
    rebuilt = load_network(tmp_path / "model.ckpt")
    assert torch.equal(rebuilt(tokens), alternating(tokens))
    assert describe(rebuilt) == describe(alternating)


def test_the_cost_of_alternating_layers_is_their_sum(alternating: LanguageModel) -> None:
    parts = [mixer_cost(block.mixer, 9) for block in alternating.layers]
    around = linear_flops(alternating.head, 9) + 4 * (2 * 9 * 2 * 8 * 16 + 2 * 9 * 3 * 8)
    total = Cost(around + sum(part.flops for part in parts), sum(part.exps for part in parts))
    assert forward_cost(alternating, 9) == total
    held = sum(block.cache_bytes(9) for block in alternating.layers)
    assert alternating.cache_bytes(9) == held


def test_a_checkpoint_of_another_pattern_is_named(tmp_path) -> None:
    def make(d_hidden: int) -> LanguageModel:
        return LanguageModel([LinearRelation(8, 8), QuadraticRelation(8, d_hidden)], 11, 2, max_length=9)

    save_network(make(12), tmp_path / "model.ckpt")
    check_same_network(tmp_path / "model.ckpt", make(12))
    with pytest.raises(ValueError, match="mixer.1.d_hidden was 12 and is 16"):
        check_same_network(tmp_path / "model.ckpt", make(16))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ([], "1 to n_layers=2 entries: got 0"),
        ([LinearRelation(8, 8)] * 3, "1 to n_layers=2 entries: got 3"),
        ([LinearRelation(8, 8), LinearRelation(6, 8)], r"share d_model: got \[6, 8\]"),
        ([LinearRelation(8, 8), LinearRelation(8, 8, causal=False)], r"share causal: got \[False, True\]"),
    ],
)
def test_patterns_that_do_not_fit_are_named(pattern: list[Mixer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(pattern, 11, n_layers=2, max_length=9)
