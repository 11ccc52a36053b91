"""Settings of small sweeps, and what is read of them."""

import csv
from pathlib import Path

from causalrn import sweep
from causalrn.sweeps.grid import read_sweep

STEPS = "trainer.max_steps"
RATE = "model.init_args.learning_rate"
NETWORK = "model.init_args.network.init_args"


def run(path: Path, *args: str) -> None:
    sweep.main(["--config", str(path), *args])


def names(path: Path) -> list[str]:
    return [point.name for point in read_sweep(path).points]


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return {row["point"]: row for row in csv.DictReader(file)}
