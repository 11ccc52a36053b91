"""Diagnostics as a command."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from causalrn import report
from causalrn.models import LanguageModel, LinearRelation, Mixer, QuadraticRelation, SoftmaxAttention
from causalrn.training.checkpoint import save_network
from tests.test_fit import CONFIG, error_of


def make_network(mixer: Mixer) -> LanguageModel:
    network = LanguageModel(mixer, vocab_size=29, n_layers=3, max_length=20).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return network


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "copy.ckpt"
    save_network(make_network(QuadraticRelation(8, 12, n_heads=2)), path, {"config": CONFIG})
    return path


@pytest.mark.slow
def test_the_command_draws_and_writes_numbers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "inside.png"
    report.main(["diagnostics", "--checkpoint", str(checkpoint), "--lengths", "4,8", "--output", str(output)])
    sets = json.loads(output.with_suffix(".json").read_text())["layers"]
    assert list(sets) == ["length_4", "length_8"]
    assert [len(layers) for layers in sets.values()] == [3, 3]
    assert {"inverse_std_q50", "largest_exponent_max", "saturated", "dispersion"} <= sets["length_8"][
        0
    ].keys()
    printed = capsys.readouterr().out
    assert "effective" in printed
    assert f"{sets['length_8'][2]['top_share']:.3g}" in printed
    with Image.open(output) as image:
        assert min(image.size) > 500


@pytest.mark.slow
def test_linear_models_have_no_common_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "linear.ckpt", tmp_path / "linear.png"
    save_network(make_network(LinearRelation(8, 12)), path, {"config": CONFIG})
    report.main(["diagnostics", "--checkpoint", str(path), "--output", str(output)])
    assert "1/s" not in capsys.readouterr().out
    assert output.exists()


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--sequences", "0"], "--sequences must be at least 1: got 0"),
        (["--positions", "-1"], "--positions must be at least 1: got -1"),
        (["--lengths", "30"], "max_length=20"),
        (["--data", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_mistakes_get_one_line(
    args: list[str], wanted: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wanted in error_of(report.main, ["diagnostics", "--checkpoint", str(checkpoint), *args], capsys)


def test_attention_has_no_diagnostics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_network(make_network(SoftmaxAttention(8)), tmp_path / "a.ckpt", {"config": CONFIG})
    line = error_of(report.main, ["diagnostics", "--checkpoint", str(tmp_path / "a.ckpt")], capsys)
    assert "relation mixers: got a layer with SoftmaxAttention" in line
