"""Files the table of a sweep as a dated benchmark: JSON with machine and command, CSV, and pictures."""

import shlex
import shutil
import sys
from pathlib import Path

import torch

from benchmarks.common import describe_machine, file_record
from causalrn.reporting import facts, views
from causalrn.reporting.figures import draw_maps, draw_panels
from causalrn.reporting.runs import Run, find_runs
from causalrn.sweeps.folder import SweepFolder
from causalrn.sweeps.grid import Sweep
from causalrn.sweeps.table import Row

TEXT_METRIC = "val/bits_per_byte"


def file_table(sweep: Sweep, folder: SweepFolder, rows: list[Row], target: Path) -> list[Path]:
    """Writes DATE_NAME.json, .csv and pictures, and returns what was written."""
    runs = find_runs([folder.path])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "sweep": sweep.path.name,
        "machine": {
            **describe_machine(device),
            "command": shlex.join(["python", "-m", "causalrn.sweep", *sys.argv[1:]]),
        },
        # The runs may be older than this record, and of other machines.
        "runs_on": [{**facts, "runs": names} for facts, names in facts.machines(runs)],
        "unfinished": [row["point"] for row in rows if row["state"] != "finished"],
        "rows": rows,
    }
    path = file_record(target, f"sweep_{sweep.path.stem}", record)
    shutil.copy(folder.path / "results.csv", path.with_suffix(".csv"))
    return [path, path.with_suffix(".csv"), *draw(runs, path)]


def draw(runs: list[Run], path: Path) -> list[Path]:
    order = list(views.variants(runs))
    if maps := views.ablation_maps(runs):
        written = draw_maps(maps, path)
    elif panels := views.lines_over_steps(runs):
        written = draw_panels(panels, order, "step", path, share=True)
    else:
        lines = [
            (name, run.series(TEXT_METRIC))
            for name, members in views.variants(runs).items()
            for run in members
        ]
        lines = [line for line in lines if line[1]]
        written = draw_panels({TEXT_METRIC: lines}, order, "step", path) if lines else []
    for figure in written:
        if figure.suffix == ".svg":
            figure.unlink()
    return [figure for figure in written if figure.suffix == ".png"]
