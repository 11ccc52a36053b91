"""Signals that announce the end of a run, from a scheduler or the keyboard: the handler only remembers them."""

import _thread
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
# A shell gives this code to a command that Ctrl-C has ended.
EXIT_INTERRUPTED = 128 + signal.SIGINT
ANNOUNCED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
SCONTROL_TIMEOUT_SECONDS = 60

_received: set[int] = set()


class _Keyboard:
    """Ctrl-C ends the process at once until a training has something to save; from then on it is remembered."""

    def __init__(self) -> None:
        self.watched: tuple[int, int] | None = None
        self.reset()

    def reset(self) -> None:
        if self.watched is not None:
            signal.set_wakeup_fd(-1)
            # Ends the thread.
            os.close(self.watched[1])
        self.watched = None
        self.importing = False
        self.saves = False
        self.says = False
        self.presses = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.importing:
            # An exception could be lost in a library that is half imported.
            os._exit(EXIT_INTERRUPTED)
        if not self.saves:
            # Lightning would turn a KeyboardInterrupt into exit code 1.
            raise SystemExit(EXIT_INTERRUPTED)
        _received.add(number)
        if self.watched is None:
            self.presses = 1
            self.watch()
            if self.says:
                # A print could meet the print that it interrupts.
                os.write(
                    2, b"\nCtrl-C: saves at the end of this step and leaves; once more: leaves at once\n"
                )

    def watch(self) -> None:
        """Looks for another Ctrl-C in a thread: the main one may wait in a collective, where no handler runs."""
        self.watched = reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        # Unlike threading.Thread it takes no lock, which the interrupted code might hold.
        _thread.start_new_thread(self.leave_at_another, (reading,))

    def leave_at_another(self, reading: int) -> None:
        # torchrun passes the terminal's SIGINT on to processes that have got it from the terminal already.
        last = 3 if "TORCHELASTIC_RUN_ID" in os.environ else 2
        while number := os.read(reading, 1):
            self.presses += number[0] == signal.SIGINT
            if self.presses >= last:
                os._exit(EXIT_INTERRUPTED)
        os.close(reading)


_keyboard = _Keyboard()


def remember(number: int, frame: FrameType | None) -> None:
    """The handler. Anything more, a collective or a lock, could meet itself in the code that it interrupts."""
    _received.add(number)


@contextlib.contextmanager
def listening(importing: bool = False) -> Iterator[None]:
    """Within it, SIGUSR1 and SIGTERM are remembered instead of ending the process, and so is Ctrl-C from
    `save_at_interrupt` on; before that it leaves with exit code 130. Nested, it only ends the imports.

    Args:
        importing: nothing but imports runs until it is entered again.
    """
    listens = signal.getsignal(signal.SIGUSR1) is remember
    # Python lets no other thread set a handler.
    if listens or threading.current_thread() is not threading.main_thread():
        _keyboard.importing = False
        yield
        return
    _received.clear()
    _keyboard.importing = importing
    before = {number: signal.signal(number, remember) for number in (signal.SIGUSR1, signal.SIGTERM)}
    # A job in the background of a script starts with Ctrl-C ignored, which is not for it.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _keyboard.handle)
    # A launcher may have held them back until there is a handler (env --block-signal in launch/fit.sbatch).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ANNOUNCED)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _keyboard.reset()


def save_at_interrupt(says: bool) -> None:
    """From here on Ctrl-C is remembered as the other signals are, and a second one leaves at once with exit code 130.

    Args:
        says: whether this process, of several, tells so when it comes.
    """
    _keyboard.saves, _keyboard.says = True, says


def received() -> set[int]:
    """The numbers of the signals that came so far."""
    return set(_received)


def requeue(numbers: set[int]) -> bool:
    """Puts this SLURM job back into the queue; False where there is no job, no scontrol, or the job was cancelled.

    SIGUSR1 is what the job asked for before its end. SIGTERM announces a preemption, or the end of a job that
    `scancel` has ended already, which must not come back; nor must one that Ctrl-C has ended.
    """
    job = job_id()
    if signal.SIGINT in numbers or job is None or shutil.which("scontrol") is None:
        return False
    if signal.SIGUSR1 not in numbers and ask("squeue", "-h", "-j", job, "-o", "%T") != "RUNNING":
        return False
    return ask("scontrol", "requeue", job) is not None


def job_id() -> str | None:
    """The name of this job for scontrol: ARRAY_INDEX for the task of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID")


def ask(*command: str) -> str | None:
    """The output of a command, or None where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
