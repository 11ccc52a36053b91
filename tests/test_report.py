"""The command `causalrn.report`: pages of runs, and the heat map of a layer's pairs."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from causalrn import report
from causalrn.models import LanguageModel, QuadraticRelation
from causalrn.models.decoding import GREEDY, generate
from causalrn.training.checkpoint import load_network, save_network
from tests.reporting.run_folders import make_run
from tests.test_fit import error_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "copy.ckpt"
    relation = QuadraticRelation(8, 12, n_heads=2)
    network = LanguageModel(relation, vocab_size=29, n_layers=3, max_length=20).eval()
    data = {"task": "copy", "alphabet_size": 26}
    save_network(network, path, {"CopyDataModule": data})
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
def test_mistakes_about_pairs_get_one_line(
    args: list[str], wanted: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wanted in error_of(report.main, ["pairs", "--checkpoint", str(checkpoint), *args], capsys)


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["nowhere"], "no run folder nowhere"),
        (["empty"], "empty holds no runs"),
        (["runs", "--metrics", "val/los"], "no run has the metric val/los: want one of val/copy_accuracy"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_about_runs_get_one_line(
    args: list[str],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "runs" / "one", "QuadraticRelation", 8, 1.0)
    assert wanted in error_of(report.main, args, capsys)
    assert not Path("report.html").exists()
