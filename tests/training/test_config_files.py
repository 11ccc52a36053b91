"""Configs are named from any folder: the working folder's own come first, then those that ship."""

import os
from pathlib import Path

import pytest
import yaml

from causalrn import evaluate, fit, sweep
from causalrn.models import LanguageModel, QuadraticRelation
from causalrn.sweeps.grid import read_sweep
from causalrn.training.checkpoint import save_network
from causalrn.training.config_files import find_config, shipped_configs
from launch.checks import read_config
from tests import ROOT
from tests.test_fit import CONFIG, error_of

PRINT = "--print_config"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path / "empty"


def printed_config(args: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    with pytest.raises(SystemExit) as exit_info:
        fit.main([*args, PRINT])
    assert not exit_info.value.code
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "copy/quickstart.yaml", "--config", "mixer/transformer.yaml"],
        ["--config=copy/quickstart.yaml", "-c", "configs/mixer/transformer.yaml"],
        ["--config", "configs/copy/quickstart.yaml", "--config={}/mixer/transformer.yaml"],
    ],
)
def test_shipped_configs_are_found_from_any_folder(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = printed_config([word.replace("{}", str(ROOT / "configs")) for word in arguments], capsys)
    assert config["model"]["init_args"]["network"]["init_args"]["mixer"]["class_path"].endswith(
        ".SoftmaxAttention"
    )
    assert config["data"]["init_args"]["length"] == 16


def test_a_file_of_the_working_folder_comes_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("copy", "configs/copy"):
        (folder / name).mkdir(parents=True)
        (folder / name / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
        config = printed_config(["--config", f"{name}/quickstart.yaml"], capsys)
        assert config["data"]["init_args"]["length"] == 8


def test_a_config_is_named_as_it_is_where_it_lies(folder: Path) -> None:
    assert find_config("copy/quickstart.yaml") == ROOT / "configs/copy/quickstart.yaml"
    (folder / "copy").mkdir()
    (folder / "copy/quickstart.yaml").touch()
    # The run's own folder is called after this name.
    assert find_config("copy/quickstart.yaml") == Path("copy/quickstart.yaml")


def test_a_run_of_a_shipped_config_is_called_after_it(folder: Path) -> None:
    fast = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
    fit.main(["--config", "copy/quickstart.yaml", *fast, "--data.init_args.batch_size", "2"])
    (run,) = folder.glob("runs/*/*")
    assert run.parent.name == "copy-quickstart"


def test_what_is_missing_is_said_with_the_places_and_near_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.yaml").touch()
    for name, wanted in (
        (
            "mixer/transfomer.yaml",
            f"no such file in {folder}/mixer or {shipped_configs()}/mixer; did you mean mixer/transformer.yaml",
        ),
        ("quickstart.yaml", "did you mean copy/quickstart.yaml or text/quickstart.yaml?"),
        ("fsdp", "did you mean trainer/fsdp.yaml?"),
        ("min.yaml", "did you mean mine.yaml"),
        ("/nowhere/else.yaml", "config /nowhere/else.yaml: no such file in /nowhere"),
        ("../copy/quickstart.yaml", f"no such file in {folder}/../copy; did you mean copy/quickstart.yaml"),
        ("copy", f"config copy: no such file in {folder} or {shipped_configs()}"),
    ):
        for spelling in (["--config", name], [f"--config={name}"]):
            assert wanted in error_of(fit.main, spelling, capsys)
    assert "did you mean" not in error_of(fit.main, ["--config", "zzzzzz"], capsys)


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}", "-c {}"])
def test_a_file_that_is_no_yaml_is_named(
    spelling: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text("a: [1")
    assert "config bad.yaml is no YAML: " in error_of(fit.main, spelling.format("bad.yaml").split(), capsys)


def test_text_and_pipes_are_configs_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--config", "copy/quickstart.yaml"]
    config = printed_config([*base, "--config", "{trainer: {max_steps: 7}}"], capsys)
    assert config["trainer"]["max_steps"] == 7
    # As a shell's <(...): a pipe can be read but once.
    reading, writing = os.pipe()
    os.write(writing, b"trainer: {max_steps: 8}")
    os.close(writing)
    assert printed_config([*base, "--config", f"/dev/fd/{reading}"], capsys)["trainer"]["max_steps"] == 8
    os.close(reading)


def test_sweeps_find_shipped_configs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(read_sweep(find_config("sweeps/copying_small.yaml")).points) == 16
    (folder / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "configs": ["copy/quickstart.yaml"],
                "grid": {"model": {"relation": {}, "transformer": {"configs": "mixer/transformer.yaml"}}},
            }
        )
    )
    sweep.main(["--config", "mine.yaml", "--dry-run"])
    printed = capsys.readouterr().out
    assert "2 of 2 points to run" in printed
    assert "model=transformer" in printed
    (folder / "copy").mkdir()
    (folder / "copy/quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    # What lies beside the file comes first.
    assert read_sweep(Path("mine.yaml")).points[0].arguments == ("--config", "copy/quickstart.yaml")
    assert "did you mean sweeps/ablation.yaml" in error_of(
        sweep.main, ["--config", "sweeps/ablations.yaml"], capsys
    )
    (folder / "mine.yaml").write_text("configs: [mixer/nap.yaml]\ngrid: {seed_everything: [1]}\n")
    line = error_of(sweep.main, ["--config", "mine.yaml"], capsys)
    assert "sweep mine.yaml: set names the config mixer/nap.yaml: no such file in" in line
    assert "mixer/nape.yaml" in line


def test_the_launcher_reads_shipped_configs() -> None:
    assert read_config(["--config", "copy/paper.yaml"])["data"]["init_args"]["batch_size"] == 320


def test_evaluation_takes_the_data_of_a_shipped_config(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = LanguageModel(QuadraticRelation(8, 8), vocab_size=29, n_layers=1, max_length=34)
    save_network(network, folder / "network.ckpt")
    base = ["--checkpoint", "network.ckpt", "--accelerator", "cpu"]
    evaluate.main([*base, "--data", "copy/quickstart.yaml", "--batch-size", "32"])
    assert "exact match" in capsys.readouterr().out
    assert "did you mean copy/quickstart.yaml" in error_of(
        evaluate.main, [*base, "--data", "copy/quickstar.yaml"], capsys
    )
    (folder / "bad.yaml").write_text("a: [1")
    assert "config bad.yaml is no YAML" in error_of(evaluate.main, [*base, "--data", "bad.yaml"], capsys)
