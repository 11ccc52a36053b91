"""The folder of a sweep: which points are finished, which can resume, which failed, and who works on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from causalrn.sweeps.grid import Point
from causalrn.system import Lock, is_locked, write_json
from causalrn.training.config_files import read_mapping
from causalrn.training.run_folder import run_lock

State = Literal["new", "half-written", "unfinished", "failed", "finished"]
LAST_LINES = 8


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep keeps its runs and its own notes.

        NAME/           run folder of a point, as `causalrn.fit` makes it
        .sweep/         logs/NAME.log, failed/NAME.txt, abandoned/, settings.json
        results.csv     the table

    Args:
        path: the folder.
    """

    path: Path

    @property
    def notes(self) -> Path:
        return self.path / ".sweep"

    def run_dir(self, point: Point) -> Path:
        return self.path / point.name

    def log(self, point: Point) -> Path:
        return self.notes / "logs" / f"{point.name}.log"

    def failure(self, point: Point) -> Path:
        return self.notes / "failed" / f"{point.name}.txt"

    def prepare(self) -> None:
        for name in ("logs", "failed", "abandoned"):
            (self.notes / name).mkdir(parents=True, exist_ok=True)

    def state(self, point: Point) -> State:
        run_dir = self.run_dir(point)
        if read_results(run_dir) is not None:
            return "finished"
        if self.failure(point).exists():
            return "failed"
        if has_checkpoint(run_dir):
            return "unfinished"
        return (
            "half-written"
            if run_dir.exists() and any(path.name != run_lock(run_dir).name for path in run_dir.iterdir())
            else "new"
        )

    def arguments(self, point: Point) -> list[str]:
        """The arguments of `causalrn.fit`: it resumes where there is a checkpoint, and else starts.

        A run that was ended before its first checkpoint cannot resume; its folder is kept aside.
        """
        run_dir = self.run_dir(point)
        if has_checkpoint(run_dir):
            return [f"--resume={run_dir}"]
        if self.state(point) == "half-written" or run_dir.exists():
            self.abandon(point)
        return [*point.arguments, f"--run_dir={run_dir}"]

    def abandon(self, point: Point) -> None:
        number = len(list((self.notes / "abandoned").glob("*")))
        self.run_dir(point).rename(self.notes / "abandoned" / f"{number}-{point.name}")

    def record_failure(self, point: Point, reason: str) -> None:
        self.failure(point).write_text(f"{reason}\n{last_lines(self.log(point))}\n")

    def check_settings(self, settings: dict[str, dict[str, Any]]) -> None:
        """Refuses a folder whose points were started with other settings, and notes those of this sweep.

        Raises:
            ValueError: naming the first point that differs and in what.
        """
        path = self.notes / "settings.json"
        known: dict[str, dict[str, Any]] = read_mapping(path)
        for name, here in settings.items():
            there = known.get(name, {})
            # Another version of the code may know further settings.
            changed = [key for key in here if key in there and there[key] != here[key]]
            if changed and (self.path / name).exists():
                values = "; ".join(f"{key} was {there[key]!r} and is {here[key]!r}" for key in changed[:3])
                raise ValueError(
                    f"{self.path} holds the point {name} with other settings: {values}; want another --output, "
                    "or move that folder away"
                )
        write_json(path, {**known, **settings})

    def lock(self) -> Lock:
        """Held while a sweep runs: two would start the same points.

        Raises:
            ValueError: another process holds it.
        """
        self.prepare()
        return Lock(self.notes / "lock", f"the sweep in {self.path}")

    def is_running(self, point: Point) -> bool:
        """Whether a process trains the point: a run holds the lock of its folder."""
        return is_locked(run_lock(self.run_dir(point)))


def has_checkpoint(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.ckpt"))


def read_results(run_dir: Path) -> dict[str, Any] | None:
    """The results that a finished run wrote; None where there are none, or a kill tore the file."""
    results = read_mapping(run_dir / "results.json")
    return results if isinstance(results.get("metrics"), dict) else None


def last_lines(path: Path, count: int = LAST_LINES) -> str:
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    # A progress bar rewrites its line.
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    return "\n".join([line for line in lines if line.strip()][-count:])
