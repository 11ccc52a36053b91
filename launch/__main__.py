"""Submits a run to SLURM: `python -m launch --nodes 2 --gpus-per-node 8 --time 12:00:00 -- --config CONFIG`."""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from causalrn.system import git, git_revision, write_json
from causalrn.training.errors import run_command
from launch.checks import check, read_config
from launch.job import Job, shown

ROOT = Path(__file__).parents[1]


def main(arguments: list[str] | None = None) -> None:
    options, command = parse(sys.argv[1:] if arguments is None else arguments)
    job = Job(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        tasks_per_node=options.tasks_per_node or options.gpus_per_node or 1,
        time=options.time,
        account=options.account,
        partition=options.partition,
        name=options.name,
        array=options.array,
    )
    config, run_dir = None, Path(options.run_dir or f"runs/{options.name}/{time.strftime('%Y%m%d-%H%M%S')}")
    if command[0].startswith("-"):
        config = read_config(command)
        run_dir = Path(config["run_dir"] or run_dir)
        for line in check(config, job, run_dir):
            print(f"checked: {line}")
        command = [*command, "--run_dir", str(run_dir)]
        if job.array:
            raise ValueError(
                "an array runs a command that reads $SLURM_ARRAY_TASK_ID, so that its tasks differ; want a program "
                "after --, as: -- bash -c 'python -m causalrn.fit ... --seed_everything $SLURM_ARRAY_TASK_ID'"
            )
    elif options.torchrun:
        raise ValueError("--torchrun starts causalrn.fit; want its arguments after --")
    line = job.torchrun_command(command) if options.torchrun else job.sbatch_command(command, options.sbatch)
    print(shown(line))
    if options.dry_run or options.torchrun:
        return
    keep(run_dir, line, config)
    submit(line, run_dir)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        usage="%(prog)s [options] -- (arguments of causalrn.fit | COMMAND ...)",
        description=__doc__,
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument(
        "--gpus-per-node", type=int, default=0, metavar="N", help="one task is started for each"
    )
    parser.add_argument("--tasks-per-node", type=int, metavar="N", help="without GPUs (default: 1)")
    parser.add_argument("--time", help="limit of the job, as 12:00:00; it comes back by itself after it")
    parser.add_argument("--account")
    parser.add_argument("--partition")
    parser.add_argument("--name", default="causalrn", help="of the job and of its run folder")
    parser.add_argument("--run-dir", help="run folder (default: runs/NAME/TIME)")
    parser.add_argument("--array", type=int, metavar="N", help="N tasks that differ by $SLURM_ARRAY_TASK_ID")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="FLAG",
        help="more for sbatch, as --sbatch=--qos=high",
    )
    parser.add_argument("--torchrun", action="store_true", help="print the line for clusters without SLURM")
    parser.add_argument(
        "--dry-run", action="store_true", help="check and print; submit nothing, write nothing"
    )
    if "--" not in arguments:
        parser.parse_args(arguments)
        raise ValueError("no command; want after -- the arguments of causalrn.fit, or a program")
    split = arguments.index("--")
    options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if not command:
        raise ValueError("nothing after --; want the arguments of causalrn.fit, or a program")
    return options, command


def keep(run_dir: Path, line: list[str], config: dict[str, Any] | None) -> None:
    """Leaves in RUN/launch what the job is made of: the code may have moved on when it starts."""
    folder = run_dir / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    changes = git("diff", "HEAD", "--binary") or ""
    write_json(folder / "launch.json", {"command": line, "git_revision": git_revision()})
    (folder / "changes.patch").write_text(changes)
    (folder / "fit.sbatch").write_text(Path(__file__).with_name("fit.sbatch").read_text())
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def submit(line: list[str], run_dir: Path) -> None:
    """Hands the job to sbatch.

    Raises:
        ValueError: there is no sbatch, or it refuses.
    """
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command, *arguments = line
    variables = {"CAUSALRN_LOGS": str(logs), "PYTHON": sys.executable}
    try:
        done = subprocess.run(
            [command, f"--output={logs}/%j.log", *arguments],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    except FileNotFoundError:
        raise ValueError("there is no sbatch here; want a login node, --torchrun, or --dry-run") from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"sbatch refuses: {error.stderr.strip()}") from error
    print(f"submitted job {done.stdout.strip()}; logs in {logs}")


if __name__ == "__main__":
    run_command(main)
