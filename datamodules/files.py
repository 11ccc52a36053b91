"""Files that several processes share: written in one step, and a lock that says who holds it."""

import atexit
import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

# A file server may need a moment to notice that the machine that held a lock is gone.
REQUEUE_SECONDS = 30.0
POLL_SECONDS = 0.2


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` at the end: a reader sees the old one or the whole new one, also
    after a crash. What an exception interrupts is removed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replaces a file, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file, as `write_atomically` does."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


class Lock:
    """Holds a lock file until `release`, or until the process ends, however it ends.

    The operating system keeps the lock (flock), so a crash leaves nothing to clean up. The file's text names the
    holder. The process that holds a lock may take it again; its forks do not hold it.

    Args:
        path: the lock file; its folder must exist.
        what: names what is locked in messages, as "run folder runs/one".
        wait: waits for another holder instead of refusing.

    Raises:
        ValueError: another process holds the lock.
        OSError: the lock file cannot be written.
    """

    def __init__(self, path: Path, what: str, wait: bool = False) -> None:
        self.path = path
        self.waited = False
        started = time.monotonic()
        while (descriptor := try_lock(path)) is None:
            other = read_holder(path)
            if other.get("host") == socket.gethostname() and other.get("pid") == os.getpid():
                break
            requeued = other.get("job") is not None and other["job"] == os.environ.get("SLURM_JOB_ID")
            if not wait and not (requeued and other.get("host") != socket.gethostname()):
                raise ValueError(f"{what} is in use by {describe(other)}")
            if not wait and time.monotonic() - started > REQUEUE_SECONDS:
                # SLURM ends a job before it starts it again: the file server has not noticed.
                warnings.warn(f"the lock of {what} is taken over: {describe(other)} is gone", stacklevel=2)
                path.unlink(missing_ok=True)
            self.waited = True
            time.sleep(POLL_SECONDS)
        self.descriptor = descriptor
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder()).encode())
            _held.add(self)
            atexit.register(self.release)

    def release(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            _held.discard(self)
            atexit.unregister(self.release)
            # The file is removed while the lock is held, because afterwards it may be another holder's.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(descriptor)):
                    self.path.unlink()
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_locks() -> None:
    """Closes the locks in a forked process.

    A lock lives as long as any process has its file open, so a fork would keep the lock of a parent that was killed.
    """
    for lock in list(_held):
        assert lock.descriptor is not None
        os.close(lock.descriptor)
        lock.descriptor = None
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


def try_lock(path: Path) -> int | None:
    """The open file that holds the lock, or None where another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file meanwhile.
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            warnings.warn(
                f"{path}: this file system has no locks; nothing keeps a second process out", stacklevel=3
            )
            return descriptor
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether any process, this one included, holds a lock; nothing is changed."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def holder() -> dict[str, Any]:
    """Who this process is, for the text of a lock file."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def read_holder(path: Path) -> dict[str, Any]:
    """Who a lock file names; nobody where it is gone, or not written yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def describe(other: dict[str, Any]) -> str:
    if not other:
        return "another process"
    return f"process {other.get('pid')} on {other.get('host')} since {other.get('since')}"
