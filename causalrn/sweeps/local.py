"""Runs the points of a sweep on this machine, a few at a time, each as a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch

from causalrn.sweeps.folder import SweepFolder, last_lines
from causalrn.sweeps.grid import Point

POLL_SECONDS = 0.3
# A run may take this long to save itself when the sweep is stopped.
GRACE_SECONDS = 60.0


class LocalRunner:
    """Starts points as slots become free, until none is left, and prints what happens.

    Args:
        folder: of the sweep.
        points: what to run, in this order.
        jobs: runs at a time; this machine's cores and visible GPUs are divided over them.
    """

    def __init__(self, folder: SweepFolder, points: list[Point], jobs: int) -> None:
        self.folder = folder
        self.points = points
        self.jobs = jobs
        self.stopping = threading.Event()
        self.ended = 0
        self.slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)

    def run(self) -> None:
        """Returns when every point has ended; Ctrl-C and SIGTERM end the runs first, which save themselves."""
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        pool = ThreadPoolExecutor(self.jobs)
        futures = [pool.submit(self.run_point, point) for point in self.points]
        try:
            for future in futures:
                future.result()
        finally:
            self.stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            signal.signal(signal.SIGTERM, before)

    def run_point(self, point: Point) -> None:
        """Runs in a thread. A run that an earlier sweep left behind, when it was killed, is waited for."""
        if self.folder.is_running(point):
            self.say(f"waiting  {point.name}: a process of an earlier sweep still runs it")
        while self.folder.is_running(point) and not self.stopping.wait(POLL_SECONDS):
            continue
        state = self.folder.state(point)
        if self.stopping.is_set():
            return
        if state != "finished":
            slot = self.slots.get()
            note = " (its folder was half-written and is kept in .sweep/abandoned)" * (
                state == "half-written"
            )
            self.say(f"{'resumed ' if state == 'unfinished' else 'started '} {point.name}{note}")
            started = time.monotonic()
            code = self.run_process(point, slot)
            self.slots.put(slot)
            if self.stopping.is_set():
                return
            if code or self.folder.state(point) != "finished":
                self.fail(point, code)
                return
            self.say(f"finished {point.name} ({time.monotonic() - started:.0f} s)", ends=True)

    def run_process(self, point: Point, slot: int) -> int:
        self.folder.failure(point).unlink(missing_ok=True)
        with self.folder.log(point).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "causalrn.fit", *self.folder.arguments(point)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(slot),
                # Ctrl-C reaches the runs once, from here.
                start_new_session=True,
            )
        while process.poll() is None and not self.stopping.wait(POLL_SECONDS):
            continue
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.wait()

    def fail(self, point: Point, code: int) -> None:
        reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        reason = reason if code else "ended before its last step"
        self.folder.record_failure(point, reason)
        self.say(f"failed   {point.name}: {reason}; {last_lines(self.folder.log(point), 1)}", ends=True)

    def say(self, text: str, ends: bool = False) -> None:
        self.ended += ends
        print(f"[{self.ended}/{len(self.points)}] {text}", flush=True)

    def environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.jobs)))
        # The sweep itself may have been started as a rank.
        environment.pop("LOCAL_RANK", None)
        if self.jobs > 1 and (devices := visible_devices()):
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return environment


def visible_devices() -> list[str]:
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    return [str(index) for index in range(torch.cuda.device_count())]
