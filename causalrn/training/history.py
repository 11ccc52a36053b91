"""The starts of a run, in its environment.json: when, where, with what, from which step to which, and for how long."""

from pathlib import Path
from typing import Any

from causalrn.training.config_files import read_mapping

NAME = "environment.json"
# These entries of a start tell its progress; the others are its environment.
PROGRESS = ("when", "from_step", "step", "seconds")


def costs(run_dir: Path) -> dict[str, Any]:
    """The entries of results.json on the starts: the seconds of all and of the last one, and how many there were.

    A start of which a former version left no seconds is counted in `starts_of_unknown_seconds`.
    """
    seconds = [start.get("seconds") for start in earlier_starts(run_dir)]
    known = [value for value in seconds if value is not None]
    unknown = len(seconds) - len(known)
    return {
        "seconds": round(sum(known), 1),
        "seconds_of_last_start": seconds[-1],
        "starts": len(seconds),
        **({"starts_of_unknown_seconds": unknown} if unknown else {}),
    }


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
