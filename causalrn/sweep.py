"""Runs a grid of trainings and collects one table: `python -m causalrn.sweep --config configs/sweeps/NAME.yaml`."""

import argparse
import fnmatch
import traceback
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich import box
from rich.table import Table

from causalrn import fit
from causalrn.cli import Parser, quiet_libraries
from causalrn.sweeps.folder import SweepFolder
from causalrn.sweeps.grid import Point, Sweep, read_sweep
from causalrn.sweeps.local import LocalRunner
from causalrn.sweeps.points import Plan, plan_points
from causalrn.sweeps.slurm import write_script
from causalrn.sweeps.table import collect, print_table, wide_console, write_table
from causalrn.system import check_options
from causalrn.training.allocator import keep_freed_memory
from causalrn.training.config_files import find_config
from causalrn.training.errors import run_command


def main(args: list[str] | None = None) -> None:
    options = make_parser().parse_args(args)
    quiet_libraries()
    check_options(options, "[1, inf)", "jobs")
    sweep = read_sweep(options.config, options.output)
    folder = SweepFolder(sweep.output)
    if options.point is not None:
        run_point(sweep, folder, options.point)
        return
    if options.collect:
        show_table(sweep, folder)
        return
    chosen = choose_points(sweep, folder, options.only, options.retry_failed)
    plans = plan_points(sweep)
    if options.dry_run:
        dry_run(sweep, folder, plans, chosen)
        return
    with folder.lock():
        folder.check_settings(
            {point.name: plan.settings for point, plan in zip(sweep.points, plans, strict=True)}
        )
        if options.slurm and chosen:
            script = write_script(sweep, folder, chosen, options.jobs, options.sbatch)
            print(f"{len(chosen)} points; submit them with: sbatch {script}")
            return
        run_here(sweep, folder, chosen, options.jobs)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m causalrn.sweep", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        type=find_config,
        required=True,
        help="the sweep file, or one that ships: sweeps/NAME.yaml",
    )
    parser.add_argument("--output", type=Path, help="folder of the sweep (default: runs/sweeps/NAME)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; threads are divided (default: 1)"
    )
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="only points of this name, as 'model=*,seed=1'"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run only the points that failed")
    parser.add_argument("--dry-run", action="store_true", help="print the points, and what they train on")
    parser.add_argument("--collect", action="store_true", help="only write and print the table")
    parser.add_argument(
        "--slurm", action="store_true", help="write an sbatch script that runs the points as a job array"
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="of the script, as --sbatch=--partition=gpu",
    )
    parser.add_argument("--point", type=int, help="run this one point in this process; for array tasks")
    return parser


def choose_points(
    sweep: Sweep, folder: SweepFolder, only: Sequence[str] | None, retry_failed: bool
) -> list[Point]:
    """The points to run: unfinished ones, and failed ones where they are asked for.

    Raises:
        ValueError: a pattern of --only that names no point.
    """
    for pattern in only or []:
        if not any(fnmatch.fnmatchcase(point.name, pattern) for point in sweep.points):
            raise ValueError(
                f"--only {pattern} names no point: want one as {sweep.points[0].name}, * allowed"
            )
    chosen = []
    for point in sweep.points:
        named = any(fnmatch.fnmatchcase(point.name, pattern) for pattern in only or [])
        state = folder.state(point)
        if (only and not named) or state == "finished":
            continue
        if state == "failed" and not (named or retry_failed):
            continue
        if retry_failed and state != "failed":
            continue
        chosen.append(point)
    return chosen


def dry_run(sweep: Sweep, folder: SweepFolder, plans: list[Plan], chosen: list[Point]) -> None:
    """Prints every point, and what it trains on."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("#", "point", "state", "steps", "parameters", "tokens"):
        table.add_column(name, justify="left" if name in ("point", "state") else "right")
    for point, plan in zip(sweep.points, plans, strict=True):
        counts = (f"{plan.steps:,}", f"{plan.parameters:,}", f"{plan.tokens:,}")
        table.add_row(str(point.index), point.name, folder.state(point), *counts)
    wide_console().print(table)
    print(f"{len(chosen)} of {len(sweep.points)} points to run")


def run_here(sweep: Sweep, folder: SweepFolder, chosen: list[Point], jobs: int) -> None:
    finished = sum(folder.state(point) == "finished" for point in sweep.points)
    print(
        f"{len(chosen)} points to run, {finished} of {len(sweep.points)} finished; folder {folder.path}",
        flush=True,
    )
    try:
        LocalRunner(folder, chosen, jobs).run()
    finally:
        # Ended before anything was started, there is nothing to show.
        if any(folder.state(point) != "new" for point in sweep.points):
            show_table(sweep, folder)
    if any(folder.failure(point).exists() for point in sweep.points):
        raise SystemExit(1)


def run_point(sweep: Sweep, folder: SweepFolder, index: int) -> None:
    """Runs one point in this process, so that a scheduler's signals reach the training itself.

    Raises:
        ValueError: no such point, or another process runs it.
    """
    if not 0 <= index < len(sweep.points):
        raise ValueError(f"--point must be in [0, {len(sweep.points)}): got {index}")
    point = sweep.points[index]
    if folder.state(point) == "finished":
        print(f"{point.name} is finished")
        return
    if getattr(rank_zero_only, "rank", 0) != 0:
        # Lightning started this process beside the first one, which holds the point.
        fit.main(folder.arguments(point))
        return
    folder.prepare()
    if folder.is_running(point):
        raise ValueError(f"point {point.name} is run by another process already")
    folder.failure(point).unlink(missing_ok=True)
    keep_freed_memory()
    try:
        fit.main(folder.arguments(point))
    except Exception as error:
        lines = "".join(traceback.format_exception_only(error)).strip()
        folder.failure(point).write_text(f"{type(error).__name__}\n{lines}\n")
        raise


@rank_zero_only
def show_table(sweep: Sweep, folder: SweepFolder) -> None:
    """Writes and prints the table, and lists what failed with its last lines.

    Raises:
        ValueError: no point has been run yet.
    """
    rows = collect(sweep, folder)
    if all(row["state"] == "new" for row in rows):
        raise ValueError(f"{folder.path} has no results yet: none of the {len(rows)} points was started")
    path = write_table(rows, folder.path)
    print_table(rows, sweep.axes)
    failed = [point for point in sweep.points if folder.state(point) == "failed"]
    for point in failed:
        reason, *lines = folder.failure(point).read_text().splitlines() or [""]
        print(f"failed: {point.name} ({reason})")
        print("\n".join(f"    {line}" for line in lines))
    if failed:
        print(f"{len(failed)} failed; run them again with --retry-failed, or one with --only NAME")
    print(f"table in {path}", flush=True)


if __name__ == "__main__":
    run_command(main)
