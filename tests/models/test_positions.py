"""Every position scheme in every mixer it fits: causality, decoding, descriptions, and the values they stand for."""

import math

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import (
    MLP,
    Alibi,
    HardAlibi,
    LanguageModel,
    LearnedGain,
    LearnedLogLengthGain,
    LearnedPositions,
    LinearRelation,
    LogLengthGain,
    LogMeanExpRelation,
    Nape,
    NoPositions,
    PairBias,
    PositionalRelation,
    RandomPositions,
    Rotary,
    SinusoidalPositions,
    SoftmaxAttention,
    build,
    describe,
)
from causalrn.models.decoding import GREEDY, generate
from causalrn.models.pair_terms import alibi_slopes
from causalrn.models.positions import rotary_angles
from causalrn.ops.reference import normalise
from causalrn.training.checkpoint import load_network, save_network

SCHEMES = {
    "default": lambda: None,
    "learned": lambda: LearnedPositions(40, 8),
    "none": NoPositions,
    "sinusoidal": SinusoidalPositions,
    "random learned": lambda: RandomPositions(LearnedPositions(40, 8), 40),
    "random sinusoidal": lambda: RandomPositions(SinusoidalPositions(), 40),
}
GAINS = {
    "learned gain": lambda: LearnedGain(2, 1.3),
    "log gain": lambda: LogLengthGain(reference=5.0),
    "learned log gain": lambda: LearnedLogLengthGain(2, reference=5.0),
}
BIASES = {
    "slopes": lambda: PairBias(slopes=[0.0, 0.3]),
    "windows": lambda: PairBias(windows=[3, None]),
    "both": lambda: PairBias(slopes=[0.1, 0.3], windows=[None, 4]),
    "alibi": lambda: Alibi(2),
    "nape": lambda: Nape(2),
    "hard alibi": lambda: HardAlibi(2, 1),
}
MIXERS = {
    "rotary": lambda causal: SoftmaxAttention(8, 2, causal=causal, rotary=Rotary()),
    "log of the mean": lambda causal: LogMeanExpRelation(
        8, 12, 2, causal=causal, gain=LogLengthGain(), bias=PairBias(slopes=[0.0, 0.2])
    ),
    **{
        f"{kind}, {name}": lambda causal, cls=cls, size=size, make=make: cls(
            *size, causal=causal, gain=make() if make in GAINS.values() else None,
            bias=make() if make in BIASES.values() else None,
        )
        for kind, cls, size in (
            ("relation", PositionalRelation, (8, 12, 2)),
            ("softmax", SoftmaxAttention, (8, 2)),
        )
        for name, make in {**GAINS, **BIASES}.items()
    },
}  # fmt: skip


def make_model(mixer="relation, log gain", scheme="none") -> LanguageModel:
    positions = SCHEMES[scheme]()
    prototype = MIXERS[mixer](True)
    model = LanguageModel(
        prototype, 11, n_layers=2, max_length=None if positions else 40, positions=positions
    )
    # Logits far enough apart that rounding decides no token.
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture(params=MIXERS)
def mixer_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 1, 5], [12]], ids=str)
def test_decoding_equals_forward(mixer_name: str, parts: list[int]) -> None:
    model = make_model(mixer_name)
    tokens = torch.randint(11, (3, 12))
    state, outputs = model.init_cache(3), []
    with torch.no_grad():
        for part in tokens.split(parts, dim=1):
            logits, state = model.extend(part, state)
            outputs.append(logits)
        assert_close(torch.cat(outputs, 1), model(tokens), atol=1e-4, rtol=1e-4)


def test_rows_of_different_lengths_decode_as_alone(mixer_name: str) -> None:
    model = make_model(mixer_name)
    prompts = [torch.randint(11, (length,)) for length in (9, 1, 4)]
    together = generate(model, prompts, 8, GREEDY)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(generate(model, [prompt], 8, GREEDY)[0], row)


def test_causality(mixer_name: str) -> None:
    x = torch.randn(1, 7, 8, requires_grad=True)
    mixer = MIXERS[mixer_name](True)
    mixer.reset_parameters(1)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 3].square().sum(), x)
    assert not gradient[0, 4:].any()
    assert gradient[0, :4].any(-1).all()


def test_bidirectional(mixer_name: str) -> None:
    x = torch.randn(1, 5, 8, requires_grad=True)
    mixer = MIXERS[mixer_name](False)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 2].square().sum(), x)
    assert gradient[0].any(-1).all()
    with pytest.raises(ValueError, match="causal=False"):
        mixer.init_cache(1)


def test_description_rebuilds(mixer_name: str, tmp_path) -> None:
    model = make_model(mixer_name)
    save_network(model, tmp_path / "model.ckpt")
    rebuilt = load_network(tmp_path / "model.ckpt")
    tokens = torch.randint(11, (2, 6))
    assert torch.equal(rebuilt(tokens), model(tokens))
    assert describe(rebuilt) == describe(model)


def test_every_parameter_learns(mixer_name: str) -> None:
    model = make_model(mixer_name)
    model(torch.randint(11, (2, 9))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_decode_and_rebuild(scheme: str) -> None:
    model = make_model(scheme=scheme)
    tokens = torch.randint(11, (2, 9))
    state = model.init_cache(2)
    first, state = model.extend(tokens[:, :6], state)
    second, _ = model.extend(tokens[:, 6:], state)
    whole = model(tokens)
    assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-5)
    rebuilt = build(describe(model)).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens), whole)
    prompts = [torch.randint(11, (length,)) for length in (9, 4)]
    together = generate(model, prompts, 8, GREEDY)
    assert torch.equal(generate(model, prompts[1:], 8, GREEDY)[0], together[1])


def test_learned_positions_keep_their_old_names() -> None:
    default, learned = make_model(scheme="default"), make_model(scheme="learned")
    assert default.state_dict().keys() == learned.state_dict().keys()
    assert "position_embedding.weight" in default.state_dict()
    # Checkpoints of before there were other positions do not name them.
    description = describe(default)
    assert description["init_args"].pop("positions") is None
    build(description).load_state_dict(default.state_dict())


def test_models_without_an_end() -> None:
    model = make_model()
    assert model.max_length is None
    assert model(torch.zeros(1, 60, dtype=torch.int64)).shape == (1, 60, 11)
    with pytest.raises(ValueError, match="no end"):
        generate(model, torch.zeros(1, 2, dtype=torch.int64), None, GREEDY)
    limited = LanguageModel(LinearRelation(8, 8), 11, n_layers=1, max_length=4, positions=NoPositions())
    with pytest.raises(ValueError, match="max_length=4"):
        limited(torch.zeros(1, 5, dtype=torch.int64))


def test_sinusoidal_values() -> None:
    x = torch.zeros(1, 3, 6)
    y = SinusoidalPositions()(x, torch.arange(3))
    frequencies = [1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)]
    expected = [math.sqrt(2) * wave(2 * f) for wave in (math.sin, math.cos) for f in frequencies]
    assert_close(y[0, 2], torch.tensor(expected))
    late = rotary_angles(torch.tensor([10_000_001]), 2, 10.0)
    assert late.item() == pytest.approx(10_000_001 % (2 * math.pi), abs=1e-4)


def test_rotary_sees_distances_only() -> None:
    rotary, q, k = Rotary(), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(i: int, j: int) -> torch.Tensor:
        return (rotary(q, torch.tensor([[i]])) * rotary(k, torch.tensor([[j]]))).sum()

    assert_close(product(5, 2), product(1005, 1002), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(product(5, 2), product(5, 3))


def test_random_positions_are_sorted_draws() -> None:
    scheme = RandomPositions(LearnedPositions(50, 4), 50)
    x, positions = torch.zeros(6, 9, 4), torch.arange(9)
    assert isinstance(scheme.positions, LearnedPositions)
    with torch.no_grad():
        scheme.positions.weight.copy_(torch.arange(50.0)[:, None].expand(50, 4))
    drawn = scheme(x, positions)[..., 0]
    assert (drawn.diff() > 0).all()
    assert len(drawn.unique(dim=0)) == 6
    assert drawn.max() > 9
    assert torch.equal(scheme.eval()(x, positions)[0, :, 0], positions.float())
    with pytest.raises(ValueError, match="ends at 20"):
        RandomPositions(LearnedPositions(20, 4), 21)


def test_gain_grows_with_the_position_and_stays_positive() -> None:
    positions = torch.tensor([0, 98, 9998])
    expected = torch.tensor([LogLengthGain.LEAST, 1.0, 1 + 0.4 * math.log(100)])
    assert_close(LogLengthGain()(positions)[:, 0], expected)
    assert_close(LearnedLogLengthGain(3)(positions), expected[:, None].expand(3, 3))


def test_logarithm_of_one_pair_does_not_depend_on_the_gain() -> None:
    x = torch.randn(2, 1, 8)
    mixers = [LogMeanExpRelation(8, 12, gain=LearnedGain(1, start)) for start in (1.0, 3.0)]
    mixers[1].load_state_dict({**mixers[0].state_dict(), "gain.factor": torch.tensor([3.0])})
    assert_close(mixers[0](x), mixers[1](x))


def test_log_mean_exp_of_all_pairs() -> None:
    gain = LogLengthGain(reference=5.0)
    mixer = LogMeanExpRelation(8, 12, 2, gain=gain)
    x = torch.randn(2, 7, 8)
    q, k = mixer.project(x)
    pairs = normalise(q[:, :, None] + k[:, None], "layer", mixer.eps)
    order = gain(torch.arange(7))[:, None, :, None]
    later = torch.ones(7, 7).triu(1).bool()[:, :, None, None]
    sums = (order * pairs).masked_fill(later, -torch.inf).logsumexp(2)
    expected = (sums - torch.arange(1, 8).log()[:, None, None]) / order[:, 0]
    assert_close(mixer.relate(q, k), expected)


def test_published_slopes_and_windows() -> None:
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert Nape(4).slopes == [0.0, 0.0, 2.0**-4, 2.0**-8]
    assert HardAlibi(4, 3).windows == [1, 2, 3, None]


def test_attention_bias_is_alibi() -> None:
    mixer = SoftmaxAttention(8, 2, bias=Alibi(2))
    x = torch.randn(1, 6, 8)
    q, k, v = (t.transpose(1, 2) for t in mixer.project(x))
    i, j = torch.arange(6)[:, None], torch.arange(6)
    logits = q @ k.mT / 2 - torch.tensor(alibi_slopes(2))[:, None, None] * (i - j)
    attention = logits.masked_fill(j > i, -torch.inf).softmax(-1) @ v
    assert_close(mixer(x), mixer.out_proj(attention.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LanguageModel(LinearRelation(8, 8), 11, 1), "want a max_length"),
        (
            lambda: LanguageModel(LinearRelation(8, 8), 11, 1, 9, positions=LearnedPositions(4, 8)),
            "max_length=9 is beyond the 4 positions",
        ),
        (lambda: PositionalRelation(8, 12, 2, gain=LearnedGain(3)), "gain.*got 3 for n_heads=2"),
        (lambda: PositionalRelation(8, 12, 2, bias=Alibi(4)), "slopes.*got 4 for n_heads=2"),
        (lambda: SoftmaxAttention(8, 2, bias=HardAlibi(3, 1)), "windows.*got 3 for n_heads=2"),
        (lambda: SoftmaxAttention(6, 2, rotary=Rotary()), "3 channels per head"),
        (lambda: PairBias(slopes=[-1.0]), r"slopes must be at least 0: got \[-1.0\]"),
        (lambda: PairBias(windows=[0]), "windows must be at least 1"),
        (lambda: PairBias(slopes=[0.5, float("nan")]), r"slopes must be at least 0: got \[0.5, nan\]"),
        (lambda: PairBias(slopes=[]), "slopes are one per head: got none"),
        (lambda: PairBias(windows=[]), "windows are one per head: got none"),
        (lambda: LearnedGain(1, 0.0), "start must be above 0: got 0.0"),
        (lambda: LogLengthGain(reference=0.0), "reference must be above 0: got 0.0"),
        (lambda: PositionalRelation(8, 12, 0), "n_heads"),
        (lambda: PairBias([0.1], [1, 2]), "got 1 and 2"),
        (lambda: HardAlibi(2, 3), r"n_windowed must be in \[0, 2\]: got 3"),
    ],
)
def test_wrong_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_mlp_stands_beside_every_scheme() -> None:
    mixer = SoftmaxAttention(8, 2, bias=Nape(2))
    model = LanguageModel(mixer, 11, 1, mlp=MLP(8, 16), positions=NoPositions())
    assert model(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 5, 11)
