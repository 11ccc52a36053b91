"""One job at a time in a run folder: a lock file that says who holds it, and that outlives no one."""

import atexit
import contextlib
import json
import os
import socket
import threading
import time
import warnings
from pathlib import Path
from typing import Any

NAME = ".lock"
# How often a holder says that it lives, and after how long a silence another machine takes it for dead.
BEAT_SECONDS = 20.0
SILENCE_SECONDS = 120.0


class RunLock:
    """Holds a run folder until `release`, or until this process ends.

    A lock is stale, and is taken over with a warning, where its process is gone (same machine), where it belongs to
    this very SLURM job (which was requeued), or where its file has not been touched for two minutes.

    Args:
        run_dir: the folder; made where it is missing.

    Raises:
        ValueError: another process holds it, or the folder cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / NAME
        self.released = threading.Event()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self.take()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(
                f"run folder {run_dir} cannot be written ({reason}); want another --run_dir"
            ) from error
        atexit.register(self.release)
        threading.Thread(target=self.beat, name="run-lock", daemon=True).start()

    def take(self) -> None:
        """Creates the lock file, or takes over one that is stale."""
        mine = holder()
        while True:
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if (stale := self.stale_lock(mine)) is not None:
                    self.put_aside(stale)
                continue
            with os.fdopen(descriptor, "w") as file:
                json.dump(mine, file)
            return

    def stale_lock(self, mine: dict[str, Any]) -> str | None:
        """The text of a lock that may be taken over, or None where it went away meanwhile.

        Raises:
            ValueError: its holder lives.
        """
        try:
            text, touched = self.path.read_text(), self.path.stat().st_mtime
        except FileNotFoundError:
            return None
        other = read_holder(text)
        if all(other.get(name) == mine[name] for name in ("host", "pid", "started")):
            return text
        silent = self.now() - touched
        if other.get("host") == mine["host"]:
            dead = process_start(other["pid"]) != other["started"]
        else:
            same_job = other.get("job") is not None and other.get("job") == mine["job"]
            dead = same_job or silent > SILENCE_SECONDS
        who = f"process {other.get('pid')} on {other.get('host')}"
        if not dead:
            raise ValueError(
                f"run folder {self.path.parent} is in use by {who}, {silent:.0f} s ago; want another --run_dir, or "
                "wait for the end of that run"
            )
        warnings.warn(f"the lock of {self.path.parent} is taken over: {who} is gone", stacklevel=5)
        return text

    def put_aside(self, stale: str) -> None:
        """Removes the lock that was found stale, and not one that somebody quicker put in its place."""
        aside = self.path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}.stale")
        try:
            os.rename(self.path, aside)
            if aside.read_text() != stale:
                os.link(aside, self.path)
        except (FileNotFoundError, FileExistsError):
            pass
        aside.unlink(missing_ok=True)

    def now(self) -> float:
        """The time by the clock that stamps the lock: a file server's may differ from this machine's."""
        probe = self.path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def beat(self) -> None:
        while not self.released.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                # A run folder that vanished is for the training itself to notice.
                continue

    def release(self) -> None:
        if not self.released.is_set():
            self.released.set()
            atexit.unregister(self.release)
            # Another process may have taken it over, if this one was silent for too long.
            if self.path.exists() and read_holder(self.path.read_text()).get("pid") == os.getpid():
                self.path.unlink(missing_ok=True)
            # A run that failed before it left anything leaves no folder either.
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()


def read_holder(text: str) -> dict[str, Any]:
    """Who a lock file names; nobody where its writer was killed while it wrote."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def holder() -> dict[str, Any]:
    """Who this process is."""
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "job": job,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def process_start(pid: int) -> str | None:
    """When a process of this machine started, or None where there is none: its number alone may be used again."""
    try:
        # The name, in parentheses, may hold spaces; the state follows it, a zombie's is Z.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self/stat").exists() else alive(pid)
    return None if state == "Z" else fields[18]


def alive(pid: int) -> str | None:
    """Where there is no /proc: whether a process of that number runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
