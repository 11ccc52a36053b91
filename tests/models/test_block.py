"""Blocks with a short convolution or a shift: causality, decoding, descriptions; those of former checkpoints load."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import (
    MLP,
    Block,
    LanguageModel,
    LinearAttention,
    LinearRelation,
    LogLengthGain,
    LogMeanExpRelation,
    Mixer,
    NoPositions,
    QuadraticRelation,
    ShortConvolution,
    ShortFilter,
    SoftmaxAttention,
    TokenShift,
    build,
    describe,
    upgrade,
)
from causalrn.models.decoding import GREEDY, generate
from causalrn.training.checkpoint import check_same_network, load_network, read_checkpoint, save_network

# Written by revision 135e603, with the logits of the network in it: initial values of seed 0.
FORMER = Path(__file__).parent / "data" / "former_convolution.ckpt"
BLOCKS = {
    "convolution, quadratic": (lambda: ShortConvolution(8, 3), lambda c: QuadraticRelation(8, 12, causal=c)),
    "convolution, linear": (lambda: ShortConvolution(8), lambda c: LinearRelation(8, 12, causal=c)),
    "one tap, linear attention": (lambda: ShortConvolution(8, 1), lambda c: LinearAttention(8, causal=c)),
    "shift, softmax": (lambda: TokenShift(norm="rms"), lambda c: SoftmaxAttention(8, 2, causal=c)),
}


@pytest.fixture(params=BLOCKS)
def parts(request: pytest.FixtureRequest) -> tuple[ShortFilter, Mixer]:
    convolution, mixer = BLOCKS[request.param]
    return convolution(), mixer(True)


@pytest.fixture
def model(parts: tuple[ShortFilter, Mixer]) -> LanguageModel:
    convolution, mixer = parts
    mlp = MLP(8, 16) if isinstance(mixer, SoftmaxAttention) else None
    model = LanguageModel(
        mixer, 11, n_layers=2, mlp=mlp, positions=NoPositions(), short_convolution=convolution
    )
    # Logits far enough apart that rounding decides no token.
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def test_no_gradient_from_the_future(parts: tuple[ShortFilter, Mixer]) -> None:
    x = torch.randn(1, 7, 8, requires_grad=True)
    block = Block(*parts, None)
    block.reset_parameters(1)
    (gradient,) = torch.autograd.grad(block(x)[0, 3].square().sum(), x)
    assert not gradient[0, 4:].any()
    assert gradient[0, :4].any(-1).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_bidirectional_block_sees_both_sides(name: str) -> None:
    convolution, mixer = BLOCKS[name]
    block = Block(convolution(), mixer(False), None)
    x = torch.randn(1, 5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x)[0, 2].square().sum(), x)
    assert gradient[0].any(-1).all()
    with pytest.raises(ValueError, match="causal=False"):
        block.init_cache(1)


def test_the_blend_of_a_bidirectional_block_is_centred() -> None:
    shift = ShortConvolution(8, 5)
    x = torch.randn(1, 9, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(shift(x, causal=False)[0, 4].square().sum(), x)
    assert gradient[0].any(-1).tolist() == [2 <= position <= 6 for position in range(9)]


@pytest.mark.parametrize("lengths", [[1] * 12, [5, 1, 1, 5], [12]], ids=str)
def test_decoding_equals_forward(model: LanguageModel, lengths: list[int]) -> None:
    tokens = torch.randint(11, (3, 12))
    state, outputs = model.init_cache(3), []
    with torch.no_grad():
        for part in tokens.split(lengths, dim=1):
            logits, state = model.extend(part, state)
            outputs.append(logits)
        assert_close(torch.cat(outputs, 1), model(tokens), atol=1e-4, rtol=1e-4)


def test_rows_of_different_lengths_decode_as_alone(model: LanguageModel) -> None:
    prompts = [torch.randint(11, (length,)) for length in (9, 1, 4)]
    together = generate(model, prompts, 8, GREEDY)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(generate(model, [prompt], 8, GREEDY)[0], row)


def test_description_rebuilds(model: LanguageModel, tmp_path: Path) -> None:
    save_network(model, tmp_path / "model.ckpt")
    rebuilt = load_network(tmp_path / "model.ckpt")
    tokens = torch.randint(11, (2, 6))
    assert torch.equal(rebuilt(tokens), model(tokens))
    assert describe(rebuilt) == describe(model)


def test_every_parameter_learns(model: LanguageModel) -> None:
    model(torch.randint(11, (2, 9))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_convolution_of_another_width_is_named() -> None:
    with pytest.raises(ValueError, match="short_convolution and mixer must share d_model: got 6 and 8"):
        LanguageModel(LinearRelation(8, 8), 11, 1, 9, short_convolution=ShortConvolution(6))
    with pytest.raises(ValueError, match="kernel_size must be at least 1: got 0"):
        ShortConvolution(8, 0)


def former_network() -> LanguageModel:
    """As the checkpoint of the former revision describes its network."""
    relation = LogMeanExpRelation(8, 16, 2, gain=LogLengthGain(slope=0.4, reference=10.0))
    return LanguageModel(
        relation, 11, n_layers=2, positions=NoPositions(), short_convolution=ShortConvolution(8, 4)
    )


def test_a_former_checkpoint_gives_its_logits() -> None:
    tokens = torch.arange(22).view(2, 11) % 11
    with torch.no_grad():
        logits = load_network(FORMER)(tokens)
    # The kernels' rounding may differ between processors.
    assert_close(logits, read_checkpoint(FORMER)["logits"], atol=1e-6, rtol=1e-6)


def test_former_weights_load_bit_for_bit_and_in_order() -> None:
    """The order is that of an optimizer's state, by which a former run resumes."""
    former = read_checkpoint(FORMER)["state_dict"]
    loaded = load_network(FORMER)
    assert len(former) == len(loaded.state_dict())
    for (name, parameter), value in zip(loaded.named_parameters(), former.values(), strict=True):
        assert torch.equal(parameter, value), name


def test_a_former_description_begins_with_the_values_that_it_began_with() -> None:
    torch.manual_seed(0)
    built = build(read_checkpoint(FORMER)["network"])
    torch.manual_seed(0)
    new = former_network()
    before = read_checkpoint(FORMER)["state_dict"].values()
    for (name, mine), built_value, value in zip(
        new.named_parameters(), built.parameters(), before, strict=True
    ):
        assert torch.equal(mine, built_value), name
        assert_close(mine.detach(), value, msg=name)


def test_a_former_description_is_that_of_the_same_network() -> None:
    former = read_checkpoint(FORMER)["network"]
    assert upgrade(former) == describe(former_network())
    assert upgrade(upgrade(former)) == upgrade(former)
    assert former["init_args"]["mixer"]["init_args"]["kernel_size"] == 4
    check_same_network(FORMER, former_network())
    # In a config, where it stands deeper, and a shift without a width.
    shift = {"class_path": "causalrn.models.TokenShift", "init_args": {"mixer": {"class_path": "own.Mixer"}}}
    config = {"model": [{"class_path": "causalrn.models.LanguageModel", "init_args": {"mixer": shift}}]}
    (network,) = upgrade(config)["model"]
    assert network["init_args"] == {
        "mixer": {"class_path": "own.Mixer"},
        "short_convolution": {"class_path": "causalrn.models.TokenShift", "init_args": {}},
    }
