"""Checkpoints and run folders that revision 135e603 wrote load, resume, evaluate and generate as they did."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from causalrn import evaluate, export, fit, generate, sweep
from causalrn.training.checkpoint import load_network, read_checkpoint
from causalrn.training.former import current_name, former_tokenizer, upgraded, upgraded_arguments
from tests import ROOT

FORMER = ROOT / "tests" / "former"
EXPECTED = json.loads((FORMER / "expected.json").read_text())
# Sums in another order than on the machine that wrote them.
TOLERANCE = 2e-5


@pytest.fixture(params=["copy", "text"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(FORMER / request.param, tmp_path / request.param, symlinks=True)
    # The config names its shards relative to the folder that training was started in.
    shutil.copytree(FORMER / "tokens", tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    return tmp_path / request.param


def test_a_network_computes_what_it_did(run_dir: Path) -> None:
    with torch.no_grad():
        logits = load_network(run_dir)(torch.arange(8)[None])
    expected = torch.tensor(EXPECTED[run_dir.name]["logits"])
    torch.testing.assert_close(logits[0, -1, :8], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_a_run_goes_on_as_it_did(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit.main(["--resume", str(run_dir), "--trainer.max_steps", "8"])
    assert "step 4\n" in capsys.readouterr().out
    loss = json.loads((run_dir / "results.json").read_text())["metrics"]["val/loss"]
    assert loss == pytest.approx(EXPECTED[run_dir.name]["val/loss after 8 steps"], abs=TOLERANCE)
    assert read_checkpoint(run_dir)["global_step"] == 8


def test_a_short_convolution_around_the_mixer_becomes_a_part_of_the_block() -> None:
    config = upgraded(yaml.safe_load((FORMER / "copy" / "config.yaml").read_text()))
    network = config["model"]["init_args"]["network"]["init_args"]
    assert network["mixer"]["class_path"] == "causalrn.models.LogMeanExpRelation"
    assert network["short_convolution"] == {
        "class_path": "causalrn.models.ShortConvolution",
        "init_args": {"d_model": 8, "kernel_size": 4, "norm": "layer", "eps": 1e-5},
    }
    assert config["data"]["class_path"] == "datamodules.TaskDataModule"
    assert config["data"]["init_args"]["task"]["class_path"] == "datamodules.tasks.RepetitiveCopy"
    assert upgraded(config) == config


def test_it_is_evaluated_and_generates(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = json.loads((run_dir / "results.json").read_text())["metrics"]["val/loss"]
    evaluate.main(["--checkpoint", str(run_dir), "--accelerator", "cpu"])
    (found,) = run_dir.glob("evaluation-*.json")
    assert json.loads(found.read_text())["metrics"]["val/loss"] == pytest.approx(loss, abs=TOLERANCE)
    capsys.readouterr()
    generate.main(["--checkpoint", str(run_dir), "--prompt", "abcd", "--max-tokens", "4", "--seed", "1"])
    # Letters stand between two tokens of the task; a network that has hardly learned may end at once.
    assert f"prompt of {6 if run_dir.name == 'copy' else 4} tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_exported_and_read_back(run_dir: Path, tmp_path: Path) -> None:
    export.main(["huggingface", "--checkpoint", str(run_dir), "--output", str(tmp_path / "folder")])
    export.main(["import-huggingface", str(tmp_path / "folder"), "--output", str(tmp_path / "back.ckpt")])
    weights, again = (load_network(path).state_dict() for path in (run_dir, tmp_path / "back.ckpt"))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.slow
def test_a_former_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FORMER / "copy", tmp_path / "out" / "n=1", symlinks=True)
    former = {"class_path": "causalrn.callbacks.LengthExtrapolation", "init_args": {"factor": 1}}
    content = {
        "configs": [str(FORMER / "copy" / "config.yaml")],
        "set": {"trainer.max_steps": 4, "trainer.callbacks": [former]},
        "grid": {"n": {1: {}, 2: {"model.init_args.network.init_args.n_layers": 2}}},
        "output": "out",
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    sweep.main(["--config", "grid.yaml"])
    rows = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert len(rows) == 3
    # The finished run was left alone.
    assert (tmp_path / "out" / "n=1" / "config.yaml").read_text() == (
        FORMER / "copy" / "config.yaml"
    ).read_text()


def test_former_names_are_taken_on_the_command_line() -> None:
    assert current_name("causalrn.lit_module.TextModule") == "causalrn.training.LanguageModelModule"
    assert current_name("causalrn.lit_modules.Mine") == "causalrn.lit_modules.Mine"
    given = ["--trainer.callbacks+=causalrn.callbacks.Norms", "--data", "datamodules.tasks.TaskDataModule"]
    names = [
        "--trainer.callbacks+=causalrn.training.callbacks.Norms",
        "--data",
        "datamodules.TaskDataModule",
    ]
    assert upgraded_arguments(given) == names


BYTES = {"kind": "bytes"}


@pytest.mark.parametrize(
    ("vocab_size", "content", "tokenizer"),
    [
        (256, {"config": {}, "TextDataModule": {"task": "text", "tokenizer": BYTES}}, BYTES),
        (
            6,
            {"config": {}, "CopyDataModule": {"task": "copy", "alphabet_size": 3}},
            {"kind": "letters", "alphabet_size": 3},
        ),
        (
            100,
            {"config": {}, "CopyDataModule": {"task": "copy", "alphabet_size": 97}},
            {"kind": "numbers", "vocab_size": 100},
        ),
        (29, {"config": {}, "RecallDataModule": {"task": "recall"}}, {"kind": "numbers", "vocab_size": 29}),
        (29, {}, {"kind": "letters", "alphabet_size": 26}),
        (256, {}, BYTES),
        (50, {}, {"kind": "numbers", "vocab_size": 50}),
    ],
)
def test_the_tokenizer_of_a_former_checkpoint_is_found(
    vocab_size: int, content: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    content["network"] = {"init_args": {"vocab_size": vocab_size}}
    assert former_tokenizer(content) == tokenizer
