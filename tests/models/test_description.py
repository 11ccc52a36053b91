"""Descriptions of networks: wrong ones are named, and those of former checkpoints load."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import (
    LanguageModel,
    LogLengthGain,
    LogMeanExpRelation,
    NoPositions,
    ShortConvolution,
    build,
    describe,
    upgrade,
)
from causalrn.training.checkpoint import check_same_network, load_network, read_checkpoint
from tests.models.networks import NAMES, make_network

# Written by revision 135e603, with the logits of the network in it: initial values of seed 0.
FORMER = Path(__file__).parent / "data" / "former_convolution.ckpt"


@pytest.mark.parametrize("name", NAMES)
def test_a_description_rebuilds_the_network(name: str) -> None:
    network = make_network(name)
    rebuilt = build(describe(network)).eval()
    rebuilt.load_state_dict(network.state_dict())
    tokens = torch.randint(11, (2, 6))
    assert torch.equal(rebuilt(tokens), network(tokens))
    assert describe(rebuilt) == describe(network)


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
