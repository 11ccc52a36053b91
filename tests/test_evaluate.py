"""The command `causalrn.evaluate`: validation, other lengths, and what it says to mistakes."""

import json
from pathlib import Path

import pytest
import yaml

from causalrn import evaluate, fit
from causalrn.evaluation.length_report import read_table
from causalrn.models import LanguageModel, QuadraticRelation
from causalrn.training.checkpoint import save_network
from tests.test_fit import CONFIG, error_of


@pytest.mark.slow
def test_it_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    run_dir = tmp_path / "run"
    fit.main(["--config", str(tmp_path / "small.yaml"), "--run_dir", str(run_dir)])
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    evaluate.main(["--checkpoint", str(checkpoint), "--accelerator", "cpu"])
    results = json.loads((run_dir / "results.json").read_text())["metrics"]
    again = json.loads((run_dir / "evaluation-last.json").read_text())["metrics"]
    assert again == pytest.approx(results)
    capsys.readouterr()
    evaluate.main(["--checkpoint", str(checkpoint), "--accelerator", "cpu", "--lengths", "4,8"])
    by_length = json.loads((run_dir / "evaluation-last-lengths.json").read_text())["metrics"]
    # Each kind of evaluation has files of its own.
    assert json.loads((run_dir / "evaluation-last.json").read_text())["metrics"] == again
    assert by_length["val/exact_match/length_8"] == pytest.approx(results["val/exact_match"])
    assert "length 4" in capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A network of two tasks' size, and the config of its data."""
    network = LanguageModel(QuadraticRelation(8, 8), vocab_size=29, n_layers=1, max_length=40)
    data = {
        "class_path": "datamodules.tasks.module.TaskDataModule",
        "init_args": {
            "task": {"class_path": "datamodules.tasks.string_tasks.Reverse"},
            "length": 8,
            "val_samples": 7,
        },
    }
    path = tmp_path / "network.ckpt"
    save_network(network, path, {"config": {"data": data}})
    return path


def test_any_task_at_any_length(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint", str(checkpoint), "--accelerator", "cpu"]
    evaluate.main([*base, "--lengths", "4,8,16,32", "--tokens-per-batch", "64"])
    printed = capsys.readouterr()
    assert "the network does not run at length 32" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert "length 16" in printed.out
    metrics = json.loads(checkpoint.with_name("evaluation-network-lengths.json").read_text())["metrics"]
    assert "val/first_error/length_16" in metrics
    rows = read_table(checkpoint.with_name("evaluation-network-lengths.csv"))
    assert [(row["length"], row["samples"]) for row in rows] == [("4", "7"), ("8", "7"), ("16", "7")]
    assert checkpoint.with_name("evaluation-network-lengths.png").read_bytes()[:4] == b"\x89PNG"
    # The numbers of an ordinary validation on the same strings.
    evaluate.main(base)
    validated = json.loads(checkpoint.with_name("evaluation-network.json").read_text())["metrics"]
    for name, value in validated.items():
        assert metrics[f"{name}/length_8"] == pytest.approx(value), name


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--lengths", "64,128"], "does not run at length 64"),
        (["--lengths", "8", "--val-samples", "0"], "--val-samples must be at least 1: got 0"),
        (["--lengths", "8", "--tokens-per-batch", "0"], "--tokens-per-batch must be at least 1: got 0"),
        (["--lengths", "8", "--max-seconds", "-1"], "--max-seconds must be above 0: got -1"),
        (["--lengths", "16777216"], "there are no samples of length 16777216"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], wanted: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--checkpoint", str(checkpoint), "--accelerator", "cpu", *arguments]
    assert wanted in error_of(evaluate.main, args, capsys)
