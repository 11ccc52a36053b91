"""The heat map of pairs shows what the operators add up, and names what it cannot draw."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from causalrn import report
from causalrn.evaluation.pairs import contributions, pair_norms
from causalrn.models import (
    LanguageModel,
    LinearRelation,
    LogLengthGain,
    Mixer,
    PairBias,
    PositionalRelation,
    QuadraticRelation,
    ShortConvolution,
    SoftmaxAttention,
)
from causalrn.models.decoding import GREEDY, generate
from causalrn.training.checkpoint import load_network, save_network
from causalrn.training.errors import run_command

MIXERS = {
    "quadratic": lambda: QuadraticRelation(8, 12, n_heads=2),
    "relu": lambda: QuadraticRelation(8, 12, pre_norm="approx", activation="relu"),
    "linear": lambda: LinearRelation(8, 12, n_heads=3),
}


def make_network(mixer: Mixer, convolution: ShortConvolution | None = None) -> LanguageModel:
    return LanguageModel(
        mixer, vocab_size=29, n_layers=3, max_length=20, short_convolution=convolution
    ).eval()


def test_contributions_add_up_to_what_the_layer_computes() -> None:
    slopes = PairBias(slopes=[0.1, 0.0])
    for mixer in (
        QuadraticRelation(8, 12, n_heads=2),
        QuadraticRelation(8, 12, activation="elu"),
        PositionalRelation(8, 12, n_heads=2, gain=LogLengthGain(reference=4.0), bias=slopes),
    ):
        q, k = (t.detach() for t in mixer.project(torch.randn(1, 9, 8)))
        expected = mixer.relate(q, k)[0, -1]
        assert_close(contributions(mixer, q[0, -1], k[0]).mean(0), expected, atol=1e-5, rtol=1e-5)


def test_pairs_behind_a_convolution_are_those_of_its_mixer() -> None:
    network = make_network(LinearRelation(8, 12), ShortConvolution(8, 3))
    tokens = torch.randint(29, (10,))
    relation = network.layers[0].mixer
    assert isinstance(relation, LinearRelation)
    seen = []
    relation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(tokens[None])
        q, k = relation.project(seen[0])
        expected = contributions(relation, q[0, 7], k[0, :8]).norm(dim=-1).mT
        assert_close(pair_norms(network, tokens, 0)[:, 7, :8], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_norms_are_those_of_the_layer(mixer: str, layer: int) -> None:
    network = make_network(MIXERS[mixer]())
    tokens = torch.randint(29, (10,))
    seen = []
    handle = network.layers[layer].mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(tokens[None])
        handle.remove()
        relation = network.layers[layer].mixer
        assert isinstance(relation, QuadraticRelation | LinearRelation)
        q, k = relation.project(seen[0])
        norms = pair_norms(network, tokens, layer)
        for i, j in ((0, 0), (7, 3), (9, 9)):
            expected = contributions(relation, q[0, i], k[0, j : j + 1])[0].norm(dim=-1)
            assert_close(norms[:, i, j], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(norms[0].isnan(), torch.ones(10, 10).triu(1).bool())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "copy.ckpt"
    data = {"task": "copy", "alphabet_size": 26}
    save_network(make_network(QuadraticRelation(8, 12, n_heads=2)), path, {"CopyDataModule": data})
    return path


def test_the_command_draws_and_writes_numbers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pairs.png"
    args = ["pairs", "--checkpoint", str(checkpoint), "--prompt", "abc", "--max-tokens", "4"]
    report.main([*args, "--layer", "1", "--position", "4", "--head", "1", "--output", str(output)])
    record = json.loads(output.with_suffix(".json").read_text())
    # The answer's last token is not read any more.
    assert record["tokens"][:5] == ["<BOS>", "a", "b", "c", "<SEP>"]
    prompt = torch.tensor([[0, 3, 4, 5, 1]])
    answer = generate(load_network(checkpoint), prompt, 4, GREEDY, stop_tokens=[2])
    assert len(record["tokens"]) == 5 + answer.shape[1] - 1
    assert (record["layer"], record["head"], record["position"]) == (1, 1, 4)
    best = max(range(5), key=lambda j: record["norms"][j])
    assert f"takes most from {best} " in capsys.readouterr().out
    with Image.open(output) as image:
        assert min(image.size) > 300
        colours = image.convert("RGB").resize((50, 50)).getcolors(2500)
        assert colours is not None
        assert len(colours) > 10


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--prompt", "abc", "--layer", "3"], "layer must be in [-3, 3): got 3"),
        (["--prompt", "abc", "--layer", "-4"], "layer must be in [-3, 3): got -4"),
        (["--prompt", "abc", "--head", "2"], "head must be in [0, 2): got 2"),
        (["--prompt", "abc", "--max-tokens", "1", "--position", "5"], "position must be in [-5, 5): got 5"),
        (["--prompt", "ABC"], "'A'"),
        (["--prompt", ""], "empty"),
        (["--prompt", "a" * 30], "max_length=20"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(
    args: list[str], wanted: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: report.main(["pairs", "--checkpoint", str(checkpoint), *args]))
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert wanted in line


def test_attention_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="SoftmaxAttention"):
        pair_norms(make_network(SoftmaxAttention(8)), torch.zeros(3, dtype=torch.int64), 0)
