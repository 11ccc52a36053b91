"""The main command on a small copy task: what it leaves, how it resumes, and what it says to mistakes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from causalrn import evaluate, fit
from causalrn.training.checkpoint import load_network, read_checkpoint
from causalrn.training.errors import run_command
from causalrn.training.loggers import read_metrics

CONFIG: dict[str, Any] = {
    "trainer": {
        "max_steps": 6,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "accelerator": "cpu",
    },
    "model": {
        "class_path": "causalrn.training.LanguageModelModule",
        "init_args": {
            "network": {
                "class_path": "causalrn.models.LanguageModel",
                "init_args": {
                    "vocab_size": 29,
                    "n_layers": 1,
                    "max_length": 18,
                    "mixer": {
                        "class_path": "causalrn.models.QuadraticRelation",
                        "init_args": {"d_model": 16, "d_hidden": 16},
                    },
                },
            }
        },
    },
    "data": {
        "class_path": "datamodules.tasks.copying.CopyDataModule",
        "init_args": {"length": 8, "batch_size": 4, "val_samples": 10},
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def run_dir(tmp_path: Path, config: Path) -> Path:
    """A finished run."""
    fit.main(["--config", str(config), "--run_dir", str(tmp_path / "run")])
    return tmp_path / "run"


def error_of(main, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command prints before it exits with code 1."""
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: main(args))
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.slow
def test_a_run_leaves_what_is_needed_to_understand_it(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    fit.main(["--config", str(config), "--run_dir", str(run_dir)])
    printed = capsys.readouterr().out
    for word in ("exact match", "character accuracy", "copy accuracy", "step 6/6", str(run_dir)):
        assert word in printed
    resolved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert resolved["data"]["init_args"]["length"] == 8
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["command"]
    revision = environment["git_revision"]
    assert revision is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", revision)
    assert [row["step"] for row in read_metrics(run_dir / "metrics.csv")] == [0, 1, 2, 3, 4, 5, 6]
    assert list(run_dir.glob("events.out.tfevents.*"))
    assert (run_dir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((run_dir / "results.json").read_text())
    assert results["step"] == 6
    assert set(results["metrics"]) == {
        "val/loss",
        "val/exact_match",
        "val/copy_accuracy",
        "val/character_accuracy",
    }
    checkpoint = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert checkpoint["config"]["model"]["init_args"]["network"]["init_args"]["n_layers"] == 1


def test_the_checkpoint_alone_rebuilds_the_network(run_dir: Path) -> None:
    network = load_network(run_dir / "checkpoints" / "last.ckpt")
    assert network(torch.zeros(2, 18, dtype=torch.int64)).shape == (2, 18, 29)


@pytest.mark.slow
def test_a_resumed_run_ends_bit_identical(tmp_path: Path, config: Path, run_dir: Path) -> None:
    half = tmp_path / "half"
    fit.main(["--config", str(config), "--run_dir", str(half), "--trainer.max_steps", "3"])
    fit.main(["--resume", str(half), "--trainer.max_steps", "6"])
    whole = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    resumed = read_checkpoint(half / "checkpoints" / "last.ckpt")
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    rows, resumed_rows = (read_metrics(folder / "metrics.csv") for folder in (run_dir, half))
    assert [row["step"] for row in rows] == [row["step"] for row in resumed_rows]
    assert [row.get("train/loss") for row in rows] == [row.get("train/loss") for row in resumed_rows]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--trainer.max_stepz", "3"], "max_stepz"),
        (["--data.init_args.lenght", "3"], "lenght"),
        (["--model.init_args.network.init_args.mixer.init_args.d_hiden", "3"], "d_hiden"),
        (["--model.init_args.network.init_args.mixer.init_args.n_heads", "5"], "d_hidden=16, n_heads=5"),
        (["--data.init_args.vocab_size", "20"], "got 29 (model) and 20"),
        (["--data.init_args.length", "40"], "max_length=18"),
        (["--model.init_args.learning_rate", "1e38"], "loss is"),
        (["--config", "no-such.yaml"], "no-such.yaml"),
        (["--resume", "no-such-run"], "no-such-run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(
    arguments: list[str], wanted: str, tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--config", str(config), "--run_dir", str(tmp_path / "run"), *arguments]
    assert wanted in error_of(fit.main, args, capsys)


def test_mistakes_in_a_file_get_one_line(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "overlay.yaml"
    for text, wanted in (("trainer:\n  max_stepz: 3\n", "max_stepz"), ("a: [1", str(overlay))):
        overlay.write_text(text)
        assert wanted in error_of(fit.main, ["--config", str(config), "--config", str(overlay)], capsys)


def test_no_run_folder_is_overwritten(
    run_dir: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert "holds a run already" in error_of(
        fit.main, ["--config", str(config), "--run_dir", str(run_dir)], capsys
    )
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_broken_checkpoints_are_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (run_dir / "checkpoints" / "last.ckpt").read_bytes()
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(whole[: len(whole) // 2])
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"weights": torch.ones(2)}, foreign)
    other = tmp_path / "other.ckpt"
    checkpoint = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    checkpoint["network"]["init_args"]["vocab_size"] = 30
    torch.save(checkpoint, other)
    capsys.readouterr()
    for path, wanted in (
        (truncated, "truncated"),
        (foreign, "another program"),
        (other, "do not fit"),
        (tmp_path / "none.ckpt", "no such file"),
    ):
        line = error_of(evaluate.main, ["--checkpoint", str(path)], capsys)
        assert wanted in line
        assert str(path) in line


def test_resuming_with_another_model_is_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    args = ["--resume", str(run_dir), "--model.init_args.network.init_args.n_layers", "2"]
    assert "n_layers was 1 and is 2" in error_of(fit.main, args, capsys)
