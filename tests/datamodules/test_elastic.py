"""A run stopped after any step and resumed on other ranks and workers sees the samples of the unbroken run."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BATCH = 4
SCRIPT = Path(__file__).with_name("elastic_run.py")


class Runs:
    """Runs segments of training in processes of their own and collects what their ranks recorded."""

    def __init__(self, folder: Path, shards: Path, accumulate: int) -> None:
        self.folder = folder
        self.shards = shards
        self.accumulate = accumulate
        self.count = 0

    def segment(
        self, ranks: int, workers: int, max_steps: int, resume: Path | None = None, **more: Any
    ) -> Path:
        """Trains up to `max_steps`; returns the folder of the segment's record and checkpoints."""
        out = self.folder / str(self.count)
        self.count += 1
        out.mkdir()
        settings = {
            "shards": str(self.shards),
            "ranks": ranks,
            "workers": workers,
            "batch_size": BATCH,
            "accumulate": self.accumulate,
            "max_steps": max_steps,
            "checkpoints": str(out),
            "record": str(out / "record"),
            "resume": None if resume is None else str(resume),
            **more,
        }
        finished = subprocess.run(
            [sys.executable, str(SCRIPT), json.dumps(settings)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=SCRIPT.parents[2],
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"},
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        return out


def micro_steps(folder: Path) -> list[list[int]]:
    """The sample ids of each micro-step in the order of the ranks, which is that of the global batch."""
    ranks = [
        [json.loads(line)["ids"] for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("record-*.jsonl"))
    ]
    return [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_on_other_ranks_and_workers_continues_the_order(
    tmp_path: Path, numbered_shards: Path, accumulate: int
) -> None:
    # 26 blocks in batches of 4: epochs of 6 batches, the data's epochs end within a batch.
    steps = 20 // accumulate
    runs = Runs(tmp_path, numbered_shards, accumulate)
    unbroken = micro_steps(runs.segment(1, 0, steps))
    assert len(unbroken) == 20
    assert sorted(list(itertools.chain(*unbroken))[:26]) == list(range(26))

    # Stops in the middle of an epoch (after batch 4), at the end of one (after 12) and once more in the middle.
    stops = [4 // accumulate, 12 // accumulate, 16 // accumulate, steps]
    seen: list[list[int]] = []
    checkpoint = None
    for stop, (ranks, workers) in zip(stops, [(2, 1), (1, 3), (4, 0), (2, 3)], strict=True):
        out = runs.segment(ranks, workers, stop, checkpoint)
        seen += micro_steps(out)
        checkpoint = out / f"step={stop}.ckpt"
    assert seen == unbroken
