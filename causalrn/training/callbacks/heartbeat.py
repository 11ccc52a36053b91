"""Ends a run that hangs, and says which rank it waits for, at which step and in what."""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L

from causalrn.system import check_range, write_json

# The places within a step where a rank can be, in their order.
STAGES = ("loading data", "forward", "backward", "optimizer step", "validation")
# Whatever starts the run again can tell a hang from a failure by this code.
EXIT_HUNG = 70


@dataclass
class Beat:
    """A rank tells the others its step, its stage, for how long it has been there, and its process."""

    step: int = 0
    stage: int = 0
    seconds: float = 0.0
    host: str = ""
    pid: int = 0


class Heartbeat(L.Callback):
    """Watches the progress of every rank from a thread.

    Each rank writes where it is into `heartbeats/` of the run folder a few times per timeout. One that makes no
    progress for `timeout_seconds` looks at what the others wrote, prints which ranks are behind and the stacks of its
    own threads, and ends its process; the launcher ends the rest. Collectives' own timeouts name neither.

    Args:
        timeout_seconds: longest time in which no batch, validation batch or checkpoint ends. The first step may
            compile, so the first batch gets twice as long.
    """

    def __init__(self, timeout_seconds: float = 1500.0) -> None:
        check_range(self, "(0, inf]", timeout_seconds=timeout_seconds)
        self.timeout_seconds = timeout_seconds
        self.stopped: threading.Event | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.stop()
        self.folder = Path(trainer.default_root_dir, "heartbeats")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank, self.ranks = trainer.global_rank, trainer.world_size
        self.place = (0, 0)
        # The first batch gets the time twice.
        self.progressed = time.monotonic() + self.timeout_seconds
        self.stopped = threading.Event()
        self.tell()
        threading.Thread(target=self.watch, args=(self.stopped,), name="heartbeat", daemon=True).start()

    def reach(self, trainer: L.Trainer, stage: int) -> None:
        self.place = (trainer.global_step, stage)
        self.progressed = max(self.progressed, time.monotonic())

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.reach(trainer, 1)

    def on_before_backward(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.reach(trainer, 2)

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.reach(trainer, 3)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.reach(trainer, 0)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.reach(trainer, 4)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.reach(trainer, 0)

    def on_exception(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.stop()

    def stop(self) -> None:
        stopped, self.stopped = self.stopped, None
        if stopped is not None:
            stopped.set()
            self.file(self.rank).unlink(missing_ok=True)
            # The last rank removes the folder.
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def tell(self) -> None:
        seconds = max(0.0, time.monotonic() - self.progressed)
        beat = Beat(*self.place, seconds, socket.gethostname(), os.getpid())
        write_json(self.file(self.rank), asdict(beat))

    def watch(self, stopped: threading.Event) -> None:
        """Runs in the thread."""
        pause = min(self.timeout_seconds / 8, 30.0)
        while not stopped.wait(pause):
            try:
                self.tell()
                beats = self.read_beats()
            except OSError:
                # A run folder that cannot be written for a moment is no reason to end a run.
                continue
            if time.monotonic() - self.progressed > self.timeout_seconds and not stopped.is_set():
                print(self.diagnosis(beats, silence_seconds=3 * pause), file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(EXIT_HUNG)

    def read_beats(self) -> dict[int, tuple[Beat, float]]:
        """The last beat of each rank, and how many seconds ago it came by the clock that stamps the files."""
        now = self.file(self.rank).stat().st_mtime
        beats = {}
        for rank in range(self.ranks):
            if self.file(rank).exists():
                beat = Beat(**json.loads(self.file(rank).read_text()))
                beats[rank] = beat, now - self.file(rank).stat().st_mtime
        return beats

    def diagnosis(self, beats: dict[int, tuple[Beat, float]], silence_seconds: float) -> str:
        """One line that names the ranks that are gone or do not answer, else those that are behind."""
        silent = {rank: pair for rank, pair in beats.items() if pair[1] > silence_seconds}
        gone = [f"rank {rank} is gone" for rank in range(self.ranks) if rank not in beats]
        behind = min((beat.step, beat.stage) for beat, _ in beats.values())
        slowest = silent or {
            rank: pair for rank, pair in beats.items() if (pair[0].step, pair[0].stage) == behind
        }
        what = []
        for rank, (beat, age) in slowest.items():
            place = f"step {beat.step}, {STAGES[beat.stage]}"
            # A rank may have gone on for up to a pause after its last beat.
            state = (
                f"has not answered for {age:.0f} s, last seen at {place}"
                if rank in silent
                else f"has not moved for {beat.seconds:.0f} s at {place}"
            )
            what.append(f"rank {rank} (process {beat.pid} on {beat.host}) {state}")
        return (
            f"error: no progress for {self.timeout_seconds:g} s on rank {self.rank} of {self.ranks}, at step "
            f"{self.place[0]}, {STAGES[self.place[1]]}: {'; '.join(gone or what)}"
        )
