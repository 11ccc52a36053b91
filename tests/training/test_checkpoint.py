"""Commands that take a checkpoint take the folder of its run, and find its data from any folder."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import benchmarks.__main__ as bench
from causalrn import evaluate, export, fit, generate, report
from causalrn.reporting.runs import find_runs
from causalrn.training.checkpoint import load_network, named_checkpoint, read_checkpoint
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.tokenizers import ByteTokenizer
from tests.test_fit import CONFIG, error_of

CPU = ["--accelerator", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a text run was started, with its shards in shards/mine and the run in runs/text."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "text.txt").write_text("A line of the text.\n" * 400)
    prepare(
        plan_files([folder / "text.txt"], PackSettings(ByteTokenizer().describe(), 0.25)),
        folder / "shards/mine",
    )
    mixer = {
        "class_path": "causalrn.models.LinearRelation",
        "init_args": {"d_model": 16, "d_hidden": 16},
    }
    network = {"vocab_size": 256, "n_layers": 1, "max_length": 32, "mixer": mixer}
    config: dict[str, Any] = {
        "trainer": {**CONFIG["trainer"], "limit_val_batches": 1},
        "model": {
            "class_path": "causalrn.training.LanguageModelModule",
            "init_args": {"network": {"class_path": "causalrn.models.LanguageModel", "init_args": network}},
        },
        "data": {
            "class_path": "datamodules.text.TextDataModule",
            "init_args": {"shards_dir": "shards/mine", "context_length": 16, "batch_size": 2},
        },
    }
    (folder / "text.yaml").write_text(yaml.safe_dump(config))
    before = Path.cwd()
    os.chdir(folder)
    try:
        fit.main(["--config", "text.yaml", "--run_dir", "runs/text"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy, which a test may change; the original is left where the checkpoints say that it is."""
    return Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def newest(run: Path) -> Path:
    return (run / "checkpoints" / "last.ckpt").resolve()


def test_a_run_folder_stands_for_its_newest_checkpoint(project: Path, tmp_path: Path) -> None:
    run = project / "runs/text"
    assert named_checkpoint(run) == newest(run)
    assert named_checkpoint(newest(run)) == newest(run)
    last = read_checkpoint(newest(run))
    assert read_checkpoint(run)["global_step"] == last["global_step"] == 6
    for name, weight in load_network(run).state_dict().items():
        assert torch.equal(weight, last["state_dict"][f"network.{name}"])
    with pytest.raises(FileNotFoundError, match=f"checkpoint {tmp_path}/none: no such file or folder"):
        named_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="without a complete checkpoint in checkpoints/"):
        named_checkpoint(project)


def test_a_damaged_checkpoint_is_passed_over(project: Path) -> None:
    run = project / "runs/text"
    damaged = newest(run)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="is passed over"):
        found = named_checkpoint(run)
    assert read_checkpoint(found)["global_step"] == 3


COMMANDS: dict[str, tuple[Callable[[list[str]], object], list[str]]] = {
    "generate": (
        generate.main,
        ["--checkpoint", "{}", "--prompt", "A ", "--max-tokens", "5", "--device", "cpu"],
    ),
    "evaluate": (evaluate.main, ["--checkpoint", "{}", *CPU]),
    "step": (export.main, ["step", "--checkpoint", "{}", "--output", "step.pt2"]),
    "huggingface": (export.main, ["huggingface", "--checkpoint", "{}", "--output", "exported"]),
    "pairs": (report.main, ["pairs", "--checkpoint", "{}", "--prompt", "A line"]),
    "diagnostics": (report.main, ["diagnostics", "--checkpoint", "{}"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_a_run_folder(
    command: str, project: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "huggingface":
        pytest.importorskip("transformers")
    main, arguments = COMMANDS[command]
    outputs = []
    for target in (project / "runs/text", newest(project / "runs/text")):
        main([word.replace("{}", str(target)) for word in arguments])
        outputs.append(capsys.readouterr().out)
        for path in elsewhere.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert outputs[0] == outputs[1] != ""
    line = error_of(main, [word.replace("{}", str(project / "shards")) for word in arguments], capsys)
    assert f"checkpoint {project}/shards is a folder without" in line


def test_consolidate_looks_into_a_run_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = project / "runs/text"
    line = error_of(export.main, ["consolidate", str(run), "--output", str(project / "new.ckpt")], capsys)
    assert f"checkpoint {newest(run)} is one file already" in line


def test_benchmarks_take_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    fit.main(["--config", str(config), "--run_dir", str(tmp_path / "run")])
    bench.main(["extrapolation", "--checkpoint", str(tmp_path / "run"), "--lengths", "4", "--samples", "4"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["checkpoint"] for row in record["rows"]] == ["run"]


def test_each_kind_of_evaluation_has_files_of_its_own(
    project: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = project / "runs/text"
    stem = newest(run).stem
    base = ["--checkpoint", str(run), *CPU]
    evaluate.main([*base, "--lengths", "8,16"])
    evaluate.main(base)
    plain, lengths = run / f"evaluation-{stem}.json", run / f"evaluation-{stem}-lengths.json"
    assert {path.name for path in run.glob("evaluation-*")} == {
        plain.name,
        lengths.name,
        f"evaluation-{stem}-lengths.csv",
        f"evaluation-{stem}-lengths.png",
    }
    found = {path: json.loads(path.read_text())["metrics"] for path in (plain, lengths)}
    assert "val/loss/length_8" in found[lengths]
    assert "val/loss" in found[plain]
    # Reports have both.
    assert find_runs([run])[0].evaluation == found[plain] | found[lengths]
    with pytest.raises(SystemExit):
        evaluate.main([*base, "--lengths", "8", "--tasks", "some"])
    assert "not allowed with argument --lengths" in capsys.readouterr().err


def metrics_of(run: Path) -> dict[str, float]:
    evaluate.main(["--checkpoint", str(run), *CPU])
    return json.loads((run / f"evaluation-{newest(run).stem}.json").read_text())["metrics"]


def test_shards_are_found_from_another_folder(
    project: Path, trained: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project / "runs/text"
    # The config keeps what the user wrote, so that reports see no difference between runs of two places.
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]["shards_dir"] == "shards/mine"
    )
    there = metrics_of(run)
    assert not list(elsewhere.iterdir())
    monkeypatch.chdir(project)
    assert metrics_of(run) == there


def test_shards_of_the_working_folder_come_first(
    project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project / "runs/text"
    before = metrics_of(run)
    # The project was moved, and its text is another one now.
    monkeypatch.chdir(project)
    shutil.rmtree("shards")
    Path("text.txt").write_text("Quite other words; 0123456789.\n" * 400)
    prepare(plan_files([Path("text.txt")], PackSettings(ByteTokenizer().describe(), 0.25)), "shards/mine")
    assert metrics_of(run) != before


# Lightning's: which of the older checkpoints are the best.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_is_resumed_from_another_folder(project: Path, elsewhere: Path) -> None:
    run = project / "runs/text"
    fit.main(["--resume", str(run), "--trainer.max_steps", "8"])
    assert read_checkpoint(run)["global_step"] == 8
    assert not list(elsewhere.iterdir())


def test_what_is_nowhere_is_said_with_every_place(
    project: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = project / "runs/text"
    content = torch.load(newest(run), weights_only=True)
    content["started_in"] = "/gone"
    torch.save(content, newest(run))
    tried = f"are not in {elsewhere}/shards/mine or /gone/shards/mine; want "
    for main, verb in ((evaluate.main, []), (report.main, ["diagnostics"])):
        assert tried in error_of(main, [*verb, "--checkpoint", str(run)], capsys)
    # A checkpoint of before the folder was kept.
    del content["started_in"]
    torch.save(content, newest(run))
    line = error_of(evaluate.main, ["--checkpoint", str(run)], capsys)
    assert f"are not in {elsewhere}/shards/mine; want " in line
    assert f"(relative to {elsewhere})" in error_of(fit.main, ["--resume", str(run)], capsys)
