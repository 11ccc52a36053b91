"""The starts of a run, in its environment.json: when, where, with what, from which step to which, and for how long."""

import datetime
import json
import time
from pathlib import Path
from typing import Any

from causalrn.system import write_json

NAME = "environment.json"
# A start that is killed may lose the count of this many seconds, unless it has written a checkpoint meanwhile.
EVERY_SECONDS = 30.0
# These entries of a start tell its progress; the others are its environment.
PROGRESS = ("when", "from_step", "step", "seconds")


class History:
    """Keeps environment.json: the environment of the newest start, and under `starts` that of each, with its progress.

    It is written at checkpoints too, so that the seconds of a start that is killed are known up to there.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.began_seconds = time.monotonic()
        self.written_seconds = 0.0
        self.starts: list[dict[str, Any]] = []

    def begin(self, environment: dict[str, Any]) -> None:
        """Adds this start after those that the folder knows."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        progress = {"when": now, "from_step": 0, "step": 0, "seconds": 0.0}
        self.starts = [*earlier_starts(self.run_dir), {**progress, **environment}]
        self.save()

    def resume_from(self, step: int) -> None:
        if self.starts:
            self.starts[-1] |= {"from_step": step, "step": step}

    def update(self, step: int, at_once: bool = True) -> None:
        """Notes where this start is; without `at_once` only where it has not been for a while."""
        now = time.monotonic()
        if self.starts and (at_once or now - self.written_seconds >= EVERY_SECONDS):
            self.starts[-1] |= {"step": step, "seconds": round(now - self.began_seconds, 1)}
            self.save()

    def save(self) -> None:
        """Writes the file in one step."""
        self.written_seconds = time.monotonic()
        newest = {name: value for name, value in self.starts[-1].items() if name not in PROGRESS}
        write_json(self.run_dir / NAME, {**newest, "starts": self.starts})

    def costs(self) -> dict[str, Any]:
        """The entries of results.json on the starts: the seconds of all and of the last one, and how many there were.

        A start of which a former version left no seconds is counted in `starts_of_unknown_seconds`.
        """
        seconds = [start.get("seconds") for start in self.starts]
        known = [value for value in seconds if value is not None]
        costs = {
            "seconds": round(sum(known), 1),
            "seconds_of_last_start": seconds[-1],
            "starts": len(seconds),
        }
        unknown = len(seconds) - len(known)
        return {**costs, **({"starts_of_unknown_seconds": unknown} if unknown else {})}


def earlier_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts that a run folder knows; of one that a former version left, the only one that it tells of."""
    environment, results = (read_mapping(run_dir / name) for name in (NAME, "results.json"))
    if "starts" in environment:
        return starts_of(environment)
    if not environment:
        return []
    return [{**starts_of(environment)[0], "step": results.get("step"), "seconds": results.get("seconds")}]


def starts_of(environment: dict[str, Any]) -> list[dict[str, Any]]:
    """The starts in the content of an environment.json; a former version's tells of the last one alone."""
    starts = environment.get("starts")
    if isinstance(starts, list):
        return [start for start in starts if isinstance(start, dict)]
    return [environment] if environment else []


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where it is missing, or where a former version was killed as it wrote it."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
