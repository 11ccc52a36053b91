"""How this process was started: which of several it is, by which job, and whether that job was here before."""

import os
from pathlib import Path

from causalrn.training.checkpoint import PREEMPTED

# Set for each process by Lightning and torchrun, by torchrun, and by srun.
RANK_VARIABLES = ("LOCAL_RANK", "RANK", "SLURM_PROCID")
# How often SLURM, and torchrun, have started this job again.
RESTART_VARIABLES = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def first_process() -> bool:
    """Whether this is the process of a run that writes its folder; known before the processes know each other."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


def job_name() -> str | None:
    """A name for the run folder that all processes of a job, and all its starts, agree on."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"job_{job}"
    if job := os.environ.get("TORCHELASTIC_RUN_ID"):
        # "none" is torchrun's default: its processes share their parent then.
        return f"torchrun_{os.getppid() if job == 'none' else job}"
    return None


def is_restarted() -> bool:
    """Whether SLURM or torchrun has started this very command before."""
    return any(os.environ.get(name, "0") != "0" for name in RESTART_VARIABLES)


def is_continued(run_dir: Path) -> bool:
    """Whether the same command has run here before and was ended by a signal, not by itself."""
    return is_restarted() or any((run_dir / "checkpoints").glob(f"{PREEMPTED}*.ckpt"))
