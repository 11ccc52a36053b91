"""Language models of every kind: official counts and initial values, decoding equals forward, rebuilding, patterns of mixers."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import (
    MLP,
    LanguageModel,
    LinearAttention,
    LinearRelation,
    Mixer,
    NoPositions,
    QuadraticRelation,
    SoftmaxAttention,
    describe,
)
from causalrn.models.decoding import GREEDY, generate
from causalrn.training.checkpoint import check_same_network, load_network, save_network
from tests.models.networks import NAMES, PATTERNS, make_network


@pytest.fixture(params=NAMES)
def network(request: pytest.FixtureRequest) -> LanguageModel:
    return make_network(request.param)


@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 1, 5], [12]], ids=str)
def test_decoding_part_by_part_equals_forward(network: LanguageModel, parts: list[int]) -> None:
    tokens = torch.randint(11, (3, 12))
    state, outputs = network.init_cache(3), []
    with torch.no_grad():
        for part in tokens.split(parts, dim=1):
            logits, state = network.extend(part, state)
            outputs.append(logits)
        assert_close(torch.cat(outputs, 1), network(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_rows_of_different_lengths_decode_as_alone(network: LanguageModel) -> None:
    prompts = [torch.randint(11, (length,)) for length in (9, 1, 4)]
    together = generate(network, prompts, 8, GREEDY)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(generate(network, [prompt], 8, GREEDY)[0], row)


def test_a_checkpoint_rebuilds_the_network(network: LanguageModel, tmp_path: Path) -> None:
    save_network(network, tmp_path / "model.ckpt")
    rebuilt = load_network(tmp_path / "model.ckpt")
    tokens = torch.randint(11, (2, 6))
    assert torch.equal(rebuilt(tokens), network(tokens))
    assert describe(rebuilt) == describe(network)


def test_every_parameter_learns(network: LanguageModel) -> None:
    network(torch.randint(11, (2, 9))).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_no_gradient_from_the_future(network: LanguageModel) -> None:
    x = torch.randn(1, 7, 8, requires_grad=True)
    stream = x
    for block in network.layers:
        stream = block(stream)
    (gradient,) = torch.autograd.grad(stream[0, 3].square().sum(), x)
    assert not gradient[0, 4:].any()
    assert gradient[0, :4].any(-1).all()


def test_the_cache_is_the_sum_of_the_blocks(network: LanguageModel) -> None:
    assert network.cache_bytes(9) == sum(block.cache_bytes(9) for block in network.layers)


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


def test_length_above_learned_positions_is_named() -> None:
    model = LanguageModel(LinearRelation(8, 12), 11, n_layers=2, max_length=16)
    with pytest.raises(ValueError, match="17 positions.*max_length=16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


def test_models_without_an_end() -> None:
    model = make_network("convolution, linear")
    assert model.max_length is None
    assert model(torch.zeros(1, 60, dtype=torch.int64)).shape == (1, 60, 11)
    with pytest.raises(ValueError, match="no end"):
        generate(model, torch.zeros(1, 2, dtype=torch.int64), None, GREEDY)
    limited = LanguageModel(LinearRelation(8, 8), 11, n_layers=1, max_length=4, positions=NoPositions())
    with pytest.raises(ValueError, match="max_length=4"):
        limited(torch.zeros(1, 5, dtype=torch.int64))


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
