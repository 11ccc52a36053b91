"""The signals by which a scheduler announces the end of a job: the handler only remembers them."""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from types import FrameType

# Lets a caller tell "saved, start me again" from a failure: EX_TEMPFAIL of sysexits.h.
EXIT_RESUME = 75
ANNOUNCED = (signal.SIGUSR1, signal.SIGTERM)
SCONTROL_TIMEOUT_SECONDS = 60

_received: set[int] = set()


def remember(number: int, frame: FrameType | None) -> None:
    """The handler. Anything more, a collective or a lock, could meet itself in the code that it interrupts."""
    _received.add(number)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within it, SIGUSR1 and SIGTERM are remembered instead of ending the process; nested, it changes nothing."""
    listens = signal.getsignal(signal.SIGUSR1) is remember
    # Python lets no other thread set a handler.
    if listens or threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    before = {number: signal.signal(number, remember) for number in ANNOUNCED}
    # A launcher may have held them back until there is a handler (env --block-signal in launch/fit.sbatch).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ANNOUNCED)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def received() -> set[int]:
    """The numbers of the signals that came so far."""
    return set(_received)


def requeue(numbers: set[int]) -> bool:
    """Puts this SLURM job back into the queue; False where there is no job, no scontrol, or the job was cancelled.

    SIGUSR1 is what the job asked for before its end. SIGTERM announces a preemption, or the end of a job that
    `scancel` has ended already, which must not come back.
    """
    job = job_id()
    if job is None or shutil.which("scontrol") is None:
        return False
    if signal.SIGUSR1 not in numbers and ask("squeue", "-h", "-j", job, "-o", "%T") != "RUNNING":
        return False
    return ask("scontrol", "requeue", job) is not None


def job_id() -> str | None:
    """What scontrol knows this job by: ARRAY_INDEX for the task of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def ask(*command: str) -> str | None:
    """What a command prints, or None where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
