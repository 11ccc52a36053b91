"""What is wrong in a config is one line that names the file or the key, what was got and what is wanted."""

from pathlib import Path

import pytest
import yaml

from causalrn import fit
from causalrn.training.errors import one_line
from datamodules.text import TextDataModule
from tests import ROOT
from tests.test_fit import CONFIG, error_of

MIXER = "model.init_args.network.init_args.mixer"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "is empty: want at least one of trainer, model, data"),
        ("# nothing yet\n", "is empty"),
        ("- 1\n- 2\n", "is no mapping: got [1, 2]"),
        ("trainer\n", "is no mapping: got 'trainer'"),
        ("trainer: 5\n", "trainer must be a mapping: got 5"),
        ("trainer:\n", "trainer must be a mapping: got None"),
        ("data: [1]\n", "data must be a mapping: got [1]"),
        ("trainer: {max_steps: [\n", "is no YAML"),
    ],
)
@pytest.mark.parametrize(
    "flag", [["--config", "{}"], ["--config={}"], ["-c", "{}"]], ids=["two", "one", "short"]
)
def test_a_file_is_named(
    flag: list[str], text: str, wanted: str, tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(text)
    args = [
        "--config",
        str(config),
        *(part.format(overlay) for part in flag),
        "--run_dir",
        str(tmp_path / "run"),
    ]
    line = error_of(fit.main, args, capsys)
    assert f"config {overlay}" in line
    assert wanted in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--trainer.max_steps", "many"], "trainer.max_steps: got many, want int"),
        (["--trainer.limit_val_batches", "all"], "trainer.limit_val_batches: got all, want int or float"),
        (
            ["--trainer.logger", "nonsense"],
            "trainer.logger: got nonsense, want the path of a class or Iterable or bool",
        ),
        (
            ["--trainer.callbacks+=causalrn.training.callbacks.Nonsense"],
            "trainer.callbacks: Nonsense: module 'causalrn.training.callbacks' has no attribute 'Nonsense'",
        ),
        (
            ["--trainer.callbacks+=causalrn.training.callbacks.Norms", "--trainer.callbacks.speed=3"],
            "trainer.callbacks: Norms: Option 'speed' is not accepted",
        ),
        (["--model.init_args.learning_rate", "fast"], "model.init_args.learning_rate: got fast, want float"),
        (
            ["--model.init_args.betas", "[0.9]"],
            "model.init_args.betas: got [0.9], want tuple with 2 elements",
        ),
        (
            [f"--{MIXER}.init_args.d_hiden", "3"],
            f"{MIXER}: QuadraticRelation: Option 'd_hiden' is not accepted",
        ),
        ([f"--{MIXER}", "Nonsense"], f"{MIXER}: got 'Nonsense', want the path of a class or list"),
        # What constructors say.
        (
            ["--model.init_args.learning_rate", "-1"],
            "LanguageModelModule: learning_rate must be at least 0: got -1.0",
        ),
        (
            ["--model.init_args.network.init_args.n_layers", "0"],
            "LanguageModel: n_layers must be at least 1: got 0",
        ),
        (["--data.init_args.batch_size", "0"], "CopyDataModule: batch_size must be at least 1: got 0"),
        (
            [
                "--trainer.callbacks+=causalrn.training.callbacks.FiniteLoss",
                "--trainer.callbacks.max_skipped=-1",
            ],
            "FiniteLoss: max_skipped must be at least 0: got -1",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_key_is_named(
    flags: list[str], line: str, tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--config", str(config), "--run_dir", str(tmp_path / "run"), *flags]
    assert error_of(fit.main, args, capsys) == f"error: {line}"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_choices_of_a_setting_are_listed(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--trainer.precision", "8"]
    line = error_of(fit.main, args, capsys)
    assert "trainer.precision: got 8, want 64, 32, 16 or " in line
    assert "'bf16-mixed', '32-true', '64-true'" in line


def test_other_messages_stay_as_they_are() -> None:
    assert one_line("first\n  second") == "first second"


@pytest.mark.parametrize("flags", [[], ["--trainer.max_steps", "3"]], ids=["nothing", "a flag"])
def test_a_command_without_a_config_is_told_what_to_give(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "want --config FILE" in error_of(fit.main, flags, capsys)


@pytest.mark.slow
def test_a_sample_that_is_too_long_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Which tells of its progress.
    TextDataModule("shards/state_of_the_union", corpus="state_of_the_union").prepare_data()
    capsys.readouterr()
    config = ["--config", str(ROOT / "configs/text/quickstart.yaml"), "--trainer.accelerator", "cpu"]
    args = [*config, "--run_dir", "run", "--trainer.callbacks.n_tokens", "62"]
    line = error_of(fit.main, args, capsys)
    assert "prompt and new tokens need 65 positions; the model has max_length=64" in line
    assert not Path("run/checkpoints").exists()
