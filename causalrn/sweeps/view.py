"""Shows the progress of a sweep: one live table on a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from causalrn.sweeps.local import LocalRunner, View


@contextmanager
def progress_view() -> Iterator[View]:
    """The view that suits standard output."""
    if not sys.stdout.isatty():
        yield PlainView()
        return
    with Live(refresh_per_second=4) as live:
        yield LiveView(live)


class PlainView:
    """Prints what happens, and at most every few seconds where things stand."""

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        self.every_n_seconds = every_n_seconds
        self.last_seconds = time.monotonic()

    def event(self, text: str) -> None:
        print(text, flush=True)

    def update(self, runner: LocalRunner) -> None:
        now = time.monotonic()
        if now - self.last_seconds >= self.every_n_seconds:
            self.last_seconds = now
            running = ", ".join(f"{job.point.name} at {runner.steps(job)[0]}" for job in runner.running)
            print(f"{summary(runner)}; running: {running or 'none'}", flush=True)


class LiveView:
    """Redraws a table of what runs, below the lines of what happened."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def event(self, text: str) -> None:
        self.live.console.print(Text(text, style="red" if text.startswith("failed") else ""))

    def update(self, runner: LocalRunner) -> None:
        table = Table.grid(padding=(0, 2))
        for job in runner.running:
            step, last = runner.steps(job)
            table.add_row(
                job.point.name,
                ProgressBar(total=last or 1, completed=step, width=24),
                f"step {step}" + (f"/{last}" if last else ""),
                f"{job.seconds:.0f} s",
            )
        ended = len(runner.done) + len(runner.failed)
        bar = ProgressBar(total=runner.total, completed=ended, width=40)
        self.live.update(Group(table, bar, Text(summary(runner), style="bold")))


def summary(runner: LocalRunner) -> str:
    left = runner.seconds_left()
    return (
        f"{len(runner.done)} of {runner.total} finished, {len(runner.running)} running, "
        f"{len(runner.waiting) + len(runner.elsewhere)} waiting, {len(runner.failed)} failed"
        + (f", about {duration(left)} left" if left is not None else "")
    )


def duration(seconds: float) -> str:
    """A time in two units at most, as "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
