"""Every position scheme: decoding, descriptions, and the values that it stands for."""

import math

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import (
    LanguageModel,
    LearnedPositions,
    LinearRelation,
    LogLengthGain,
    NoPositions,
    PositionalRelation,
    RandomPositions,
    Rotary,
    SinusoidalPositions,
    build,
    describe,
)
from causalrn.models.decoding import GREEDY, generate
from causalrn.models.positions import rotary_angles

SCHEMES = {
    "default": lambda: None,
    "learned": lambda: LearnedPositions(40, 8),
    "none": NoPositions,
    "sinusoidal": SinusoidalPositions,
    "random learned": lambda: RandomPositions(LearnedPositions(40, 8), 40),
    "random sinusoidal": lambda: RandomPositions(SinusoidalPositions(), 40),
}


def make_model(scheme: str) -> LanguageModel:
    positions = SCHEMES[scheme]()
    mixer = PositionalRelation(8, 12, 2, gain=LogLengthGain(reference=5.0))
    model = LanguageModel(mixer, 11, n_layers=2, max_length=None if positions else 40, positions=positions)
    # Logits far enough apart that rounding decides no token.
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_decode_and_rebuild(scheme: str) -> None:
    model = make_model(scheme)
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
    default, learned = make_model("default"), make_model("learned")
    assert default.state_dict().keys() == learned.state_dict().keys()
    assert "position_embedding.weight" in default.state_dict()
    # Checkpoints of before there were other positions do not name them.
    description = describe(default)
    assert description["init_args"].pop("positions") is None
    build(description).load_state_dict(default.state_dict())


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LanguageModel(LinearRelation(8, 8), 11, 1), "want a max_length"),
        (
            lambda: LanguageModel(LinearRelation(8, 8), 11, 1, 9, positions=LearnedPositions(4, 8)),
            "max_length=9 is beyond the 4 positions",
        ),
    ],
)
def test_wrong_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
