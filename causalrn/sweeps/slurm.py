"""Writes the sbatch script that runs the points of a sweep as a SLURM job array."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from causalrn.sweeps.folder import SweepFolder
from causalrn.sweeps.grid import Point, Sweep


def write_script(
    sweep: Sweep, folder: SweepFolder, points: Sequence[Point], jobs: int, options: Sequence[str]
) -> Path:
    """Writes FOLDER/.sweep/array.sbatch and returns its path.

    A requeued task continues its point; the array itself can be submitted again, and skips what is finished.

    Args:
        sweep: what to run.
        folder: of the sweep.
        points: those to run, finished ones left out.
        jobs: tasks at a time.
        options: further #SBATCH options, as "--partition=gpu".
    """
    command = [sys.executable, "-m", "causalrn.sweep", "--config", str(sweep.path.absolute())]
    command += ["--output", str(folder.path.absolute())]
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={sweep.path.stem}",
        f"#SBATCH --array={','.join(str(point.index) for point in points)}%{jobs}",
        f"#SBATCH --output={folder.notes.absolute()}/logs/array-%A_%a.log",
        # A requeued task writes on where it was.
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f'srun {shlex.join(command)} --point "$SLURM_ARRAY_TASK_ID"',
    ]
    path = folder.notes / "array.sbatch"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path
