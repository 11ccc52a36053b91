"""Runs the points of a sweep on this machine, a few at a time, each as a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import IO, Protocol

import torch

from causalrn.sweeps.folder import SweepFolder, last_lines
from causalrn.sweeps.grid import Point
from causalrn.sweeps.points import threads_per_job

POLL_SECONDS = 0.3
# How long a run may take to save itself when the sweep is stopped.
GRACE_SECONDS = 60.0
PROGRESS = re.compile(r"^step (\d+)(?:/(\d+))?")


class View(Protocol):
    """What shows the progress of a sweep."""

    def update(self, runner: "LocalRunner") -> None: ...

    def event(self, text: str) -> None: ...


@dataclass
class Job:
    """A point that is being run."""

    point: Point
    process: subprocess.Popen[bytes]
    lock: IO[str]
    slot: int
    start_seconds: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start_seconds


class LocalRunner:
    """Starts points as slots become free, until none is left.

    Args:
        folder: of the sweep.
        points: what to run, in this order.
        jobs: runs at a time.
        view: shows the progress.
    """

    def __init__(self, folder: SweepFolder, points: list[Point], jobs: int, view: View) -> None:
        self.folder = folder
        self.waiting = list(points)
        self.jobs = jobs
        self.view = view
        self.total = len(points)
        self.running: list[Job] = []
        # Of an earlier sweep that was killed: its runs go on, and hold their points.
        self.elsewhere: list[Point] = []
        self.done: list[tuple[Point, float]] = []
        self.failed: list[Point] = []

    def run(self) -> None:
        """Runs everything; on Ctrl-C or SIGTERM ends the runs, which then are unfinished, and raises."""
        previous = signal.signal(signal.SIGTERM, raise_interrupt)
        try:
            while self.waiting or self.running or self.elsewhere:
                self.poll()
                self.view.update(self)
                time.sleep(POLL_SECONDS)
            self.view.update(self)
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)

    def poll(self) -> None:
        for job in list(self.running):
            if job.process.poll() is not None:
                self.running.remove(job)
                self.finish(job)
        while self.waiting and len(self.running) < self.jobs:
            self.start(self.waiting.pop(0))
        for point in list(self.elsewhere):
            if (lock := self.folder.lock_point(point)) is not None:
                lock.close()
                self.elsewhere.remove(point)
                if self.folder.state(point) == "finished":
                    self.done.append((point, 0.0))
                else:
                    self.waiting.append(point)

    def start(self, point: Point) -> None:
        lock = self.folder.lock_point(point)
        if lock is None:
            self.elsewhere.append(point)
            self.view.event(f"waiting  {point.name}: a process of an earlier sweep still runs it")
            return
        state = self.folder.state(point)
        self.folder.failure(point).unlink(missing_ok=True)
        slot = min(set(range(self.jobs)) - {job.slot for job in self.running})
        with self.folder.log(point).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "causalrn.fit", *self.folder.arguments(point)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(slot),
                # The run holds its point for as long as it lives, even where this process is killed.
                pass_fds=[lock.fileno()],
                # Ctrl-C reaches the runs once, through stop().
                start_new_session=True,
            )
        self.running.append(Job(point, process, lock, slot))
        note = " (its folder was half-written and is kept in .sweep/abandoned)" * (state == "half-written")
        self.view.event(f"{'resumed ' if state == 'unfinished' else 'started '} {point.name}{note}")

    def environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(threads_per_job(self.jobs)))
        # Were this process a rank of a run itself.
        environment.pop("LOCAL_RANK", None)
        if self.jobs > 1 and (devices := visible_devices()):
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return environment

    def finish(self, job: Job) -> None:
        job.lock.close()
        code = job.process.returncode
        if code == 0 and self.folder.state(job.point) == "finished":
            self.done.append((job.point, job.seconds))
            self.view.event(f"finished {job.point.name} ({job.seconds:.0f} s)")
            return
        reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        reason = reason if code else "ended before its last step"
        self.folder.record_failure(job.point, reason)
        self.failed.append(job.point)
        self.view.event(f"failed   {job.point.name}: {reason}; {last_lines(self.folder.log(job.point), 1)}")

    def stop(self) -> None:
        for job in self.running:
            job.process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for job in self.running:
            try:
                job.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
            job.lock.close()

    def steps(self, job: Job) -> tuple[int, int | None]:
        """The step that a run has reached, and its last one, as its own output tells."""
        for line in reversed(last_lines(self.folder.log(job.point), 6).splitlines()):
            if match := PROGRESS.match(line):
                return int(match[1]), int(match[2]) if match[2] else None
        return 0, None

    def seconds_left(self) -> float | None:
        """From the mean of the runs that have ended."""
        times = [seconds for _, seconds in self.done if seconds]
        if not times:
            return None
        mean = sum(times) / len(times)
        ahead = mean * (len(self.waiting) + len(self.elsewhere)) + sum(
            max(0.0, mean - job.seconds) for job in self.running
        )
        return ahead / self.jobs


def raise_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def visible_devices() -> list[str]:
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]
