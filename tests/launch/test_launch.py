"""The launcher without a cluster: what it would submit, and what it refuses before anything waits in a queue."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from causalrn import fit
from causalrn.training.errors import run_command
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.tokenizers import ByteTokenizer
from launch.__main__ import main
from launch.job import SCRIPT, Job
from tests.faults import ROOT
from tests.test_fit import error_of

COPY = ["--config", str(ROOT / "configs/copy/paper.yaml")]
DDP = ["--config", str(ROOT / "configs/trainer/ddp.yaml")]
TEXT = ["--config", str(ROOT / "configs/text/quickstart.yaml")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "8", "--time", "1-12", "--account", "a", "--partition", "p"]
    main([*options, "--sbatch=--qos=high", "--run-dir", "runs/x", "--dry-run", "--", *COPY, *DDP])
    *checks, line = capsys.readouterr().out.splitlines()
    assert "checked: 2 nodes x 8 tasks = 16 ranks" in checks
    assert "checked: batch_size 320 over 16 ranks" in checks
    words = shlex.split(line)
    assert words[:2] == ["sbatch", "--parsable"]
    flags = {
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=1-12",
        "--account=a",
        "--partition=p",
    }
    assert flags | {"--qos=high", str(SCRIPT)} <= set(words)
    assert words[words.index(str(SCRIPT)) + 1 :] == [*COPY, *DDP, "--run_dir", "runs/x"]
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_torchrun_lines_for_one_node_and_for_many(capsys: pytest.CaptureFixture[str]) -> None:
    for nodes, wanted in (("1", "--standalone"), ("2", "--rdzv-endpoint HEAD_NODE:29500")):
        main(["--torchrun", "--nodes", nodes, "--tasks-per-node", "2", "--", *COPY, *DDP, "--run_dir", "x"])
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith("torchrun ")
        assert wanted in line
        assert f"--trainer.num_nodes {nodes} --trainer.devices 2" in line


@pytest.mark.parametrize(
    ("options", "command", "wanted"),
    [
        (["--gpus-per-node", "3"], [*COPY, *DDP], "not divisible by 3 ranks; want for example 318 or 321"),
        (["--tasks-per-node", "2"], COPY, "2 tasks and trainer.strategy auto"),
        (
            ["--tasks-per-node", "2"],
            [*COPY, *DDP, "--trainer.devices", "4"],
            "devices is 4 and the job has 2",
        ),
        ([], [*COPY, "--trainer.accelerator", "gpu"], "the job has no GPUs"),
        (["--gpus-per-node", "4", "--tasks-per-node", "2"], COPY, "got 2 tasks and 4 GPUs per node"),
        (["--time", "tomorrow"], COPY, "--time wants minutes"),
        (["--nodes", "0"], COPY, "--nodes must be at least 1: got 0"),
        ([], [*TEXT, "--data.init_args.corpus", "null"], "no manifest.json in shards/state_of_the_union"),
        ([], ["--config", "missing.yaml"], "missing.yaml"),
        ([], [*COPY, "--run_dir", "/sys/run"], "run folder /sys/run cannot be written"),
        (["--array", "2"], COPY, "SLURM_ARRAY_TASK_ID"),
        (["--torchrun"], ["bash"], "--torchrun starts causalrn.fit"),
        ([], [], "nothing after --"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(
    options: list[str], command: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wanted in error_of(main, [*options, "--dry-run", "--", *command], capsys)


def test_a_sequence_must_be_divisible_by_the_ranks_that_share_it(capsys: pytest.CaptureFixture[str]) -> None:
    overlay = ["--config", str(ROOT / "configs/trainer/context_parallel.yaml")]
    line = error_of(main, ["--tasks-per-node", "3", "--dry-run", "--", *TEXT, *overlay], capsys)
    assert "context_length 64 is not divisible by the 3 ranks that share a sequence" in line


def test_deepspeed_must_be_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = [*COPY, "--trainer.strategy", "deepspeed_stage_2"]
    assert "needs the package deepspeed" in error_of(main, ["--dry-run", "--", *command], capsys)


def test_remote_shards_must_be_readable(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAUSALRN_CACHE", str(folder / "cache"))
    (folder / "text.txt").write_text("abcdefg\n" * 4000)
    prepare(
        plan_files([folder / "text.txt"], PackSettings(ByteTokenizer().describe(), 0.25)), folder / "shards"
    )
    for address in (f"pipe:cat {folder}/shards/{{}}", f"pipe:cat {folder}/nowhere/{{}}"):
        overlay = {
            "data": {
                "class_path": "datamodules.text.TextDataModule",
                "init_args": {"shards_dir": address, "corpus": None},
            }
        }
        (folder / "remote.yaml").write_text(yaml.safe_dump(overlay))
        arguments = ["--dry-run", "--", *TEXT, "--config", "remote.yaml"]
        if "nowhere" in address:
            assert f"cannot read pipe:cat {folder}/nowhere/manifest.json" in error_of(main, arguments, capsys)
        else:
            main(arguments)
            assert "1 training shards in pipe:cat" in capsys.readouterr().out


def test_a_used_run_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").touch()
    command = [*COPY, "--run_dir", str(folder)]
    assert "holds a run already" in error_of(main, ["--dry-run", "--", *command], capsys)


@pytest.mark.slow
def test_a_resumed_run_is_submitted_into_its_own_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, weights = folder / "first", ["--init_from", str(folder / "first")]
    command = ["--config", str(ROOT / "configs/copy/quickstart.yaml"), "--trainer.max_steps", "1"]
    fit.main([*command, "--run_dir", str(run_dir)])
    (resumed, into), (begun, new) = [
        submitted(["--dry-run", "--run-dir", str(folder / "new"), "--", *arguments], capsys)
        for arguments in (["--resume", str(run_dir), "--trainer.max_steps", "2"], [*command, *weights])
    ]
    assert f"--resume {run_dir}" in resumed
    assert into == str(run_dir)
    assert f"--init_from {run_dir}" in begun
    assert new == str(folder / "new")


def submitted(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The line that would submit the job, and the run folder in it."""
    capsys.readouterr()
    main(arguments)
    line = capsys.readouterr().out.splitlines()[-1]
    return line, line.partition("--run_dir ")[2].split()[0]


def test_without_sbatch_it_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert "there is no sbatch here" in error_of(main, ["--", *COPY], capsys)


def test_the_usage_names_the_separator(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(lambda: main(["--nodes", "2"]))
    assert "want after -- the arguments of causalrn.fit" in capsys.readouterr().err


def test_the_script_runs_any_command_under_plain_bash(folder: Path) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    shown = subprocess.run(
        ["bash", str(SCRIPT), "echo", "$HOME", "a b"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert shown.stdout == "$HOME a b\n"
    # An echo in place of Python shows the line that would train.
    (folder / "python").write_text('#!/bin/sh\necho "$@"\n')
    (folder / "python").chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(folder / "python")}
    for ranks, wanted in (
        ("1", "-m causalrn.fit --config x\n"),
        (
            "2",
            "-m torch.distributed.run --standalone --nproc-per-node 2 -m causalrn.fit --config x --trainer.devices 2\n",
        ),
    ):
        shown = subprocess.run(
            ["bash", str(SCRIPT), "--config", "x"],
            capture_output=True,
            text=True,
            check=True,
            env={**environment, "LOCAL_RANKS": ranks},
        )
        assert shown.stdout == wanted


def test_a_job_counts_its_ranks() -> None:
    assert Job(nodes=4, gpus_per_node=8, tasks_per_node=8).ranks == 32


@pytest.mark.parametrize("recipe", ["Dockerfile", "causalrn.def"])
def test_recipes_install_as_the_readme_does(recipe: str) -> None:
    text = (SCRIPT.parent / recipe).read_text()
    for package in ("torch==2.13.0", "-c constraints.txt"):
        assert package in text
    # What they copy is there.
    for names in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for name in names.split():
            assert (ROOT / name).exists(), name


def test_the_documented_command_passes_the_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    block = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)[0]
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "launch"]
    main(["--dry-run", *words[3:]])
    assert "sbatch --parsable" in capsys.readouterr().out
