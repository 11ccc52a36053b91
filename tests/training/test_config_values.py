"""What a config leaves out, because another part of it says so already, is filled in; what it states stays."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from causalrn.cli import CLI
from causalrn.models import MLP, LanguageModel, QuadraticRelation, ShortConvolution
from causalrn.training.checkpoint import save_network

NETWORK: dict[str, Any] = {
    "n_layers": 2,
    "mixer": {
        "class_path": "causalrn.models.QuadraticRelation",
        "init_args": {"d_model": 12, "d_hidden": 16},
    },
    "mlp": "causalrn.models.MLP",
    "short_convolution": "causalrn.models.ShortConvolution",
}
COPY = {"class_path": "datamodules.CopyDataModule", "init_args": {"length": 16, "batch_size": 4}}


def resolved_network(tmp_path: Path, network: dict[str, Any], *flags: str) -> dict[str, Any]:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"network": network}, "data": COPY}))
    return CLI(["--config", str(path), *flags]).resolved["model"]["init_args"]["network"]["init_args"]


def test_vocabulary_length_and_widths(tmp_path: Path) -> None:
    network = resolved_network(tmp_path, NETWORK)
    # The letters and three special tokens; BOS, the string, SEP, the string again.
    assert (network["vocab_size"], network["max_length"]) == (29, 34)
    assert (
        network["mlp"]["init_args"]["d_model"] == network["short_convolution"]["init_args"]["d_model"] == 12
    )


def test_they_follow_the_command_line(tmp_path: Path) -> None:
    flags = ("--data.init_args.length", "20", "--model.network.mixer.d_model", "24")
    network = resolved_network(tmp_path, NETWORK, *flags)
    assert network["max_length"] == 42
    assert network["mlp"]["init_args"]["d_model"] == 24


def test_a_pattern_gives_the_width(tmp_path: Path) -> None:
    mixer = NETWORK["mixer"]
    network = resolved_network(tmp_path, NETWORK | {"mixer": [mixer, mixer]})
    assert network["mlp"]["init_args"]["d_model"] == 12


def test_what_is_stated_stays(tmp_path: Path) -> None:
    mlp = {"class_path": "causalrn.models.MLP", "init_args": {"d_model": 7, "d_hidden": 9}}
    network = resolved_network(tmp_path, NETWORK | {"vocab_size": 40, "max_length": 50, "mlp": mlp})
    assert (network["vocab_size"], network["max_length"]) == (40, 50)
    assert network["mlp"]["init_args"]["d_model"] == 7


def test_a_network_without_an_end_keeps_none(tmp_path: Path) -> None:
    network = resolved_network(tmp_path, NETWORK | {"positions": "causalrn.models.NoPositions"})
    assert network["max_length"] is None


def test_a_run_that_begins_with_weights_has_their_network(tmp_path: Path) -> None:
    network = LanguageModel(QuadraticRelation(12, 16), vocab_size=29, n_layers=2, max_length=77)
    save_network(network, tmp_path / "weights.ckpt")
    filled = resolved_network(tmp_path, NETWORK, "--init_from", str(tmp_path / "weights.ckpt"))
    assert filled["max_length"] == 77


def test_another_mixer_keeps_the_widths(tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"network": {"mixer": "causalrn.models.LinearRelation"}}}))
    mixer = resolved_network(tmp_path, NETWORK, "--config", str(overlay))["mixer"]
    assert mixer["class_path"] == "causalrn.models.LinearRelation"
    assert (mixer["init_args"]["d_model"], mixer["init_args"]["d_hidden"]) == (12, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (MLP, "MLP: d_model is missing"),
        (ShortConvolution, "ShortConvolution: d_model is missing"),
        (lambda: LanguageModel(MLP(4)), "LanguageModel: vocab_size is missing"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_code_must_state_them(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
