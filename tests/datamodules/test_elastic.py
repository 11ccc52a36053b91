"""A run stopped after any step and resumed on other ranks and workers sees the samples of the unbroken run."""

import itertools
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.prepare.packing import PackSettings
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.tokenizers import ByteTokenizer
from tests.datamodules.elastic_run import Recorder, run, run_alone
from tests.datamodules.server import serving

BATCH = 4
# Each segment begins as a fork of a process that has imported everything, and has computed nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.datamodules.elastic_run"])


class Runs:
    """Runs segments of training in processes of their own and collects what their ranks recorded."""

    def __init__(self, folder: Path, shards: Path | str, accumulate: int) -> None:
        self.folder = folder
        self.shards = shards
        self.accumulate = accumulate
        self.count = 0

    def segment(self, ranks: int, workers: int, max_steps: int, resume: Path | None = None) -> Path:
        """Trains up to `max_steps`; returns the folder of the segment's record and its checkpoint."""
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
            # The ranks wait for one another at each checkpoint.
            "save_every": max_steps,
            "checkpoints": str(out),
            "record": str(out / "record"),
            "resume": None if resume is None else str(resume),
        }
        cache = {"CAUSALRN_CACHE": str(self.folder / "cache")}
        process = PROCESSES.Process(target=run_alone, args=(settings, cache))
        process.start()
        process.join(300)
        code = process.exitcode
        process.kill()
        assert code == 0
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


@pytest.mark.slow
def test_a_remote_run_resumes_on_other_ranks_like_a_local_one(tmp_path: Path, numbered_shards: Path) -> None:
    unbroken = micro_steps(Runs(tmp_path, numbered_shards, 1).segment(1, 0, 12))
    with serving(numbered_shards) as server:
        runs = Runs(tmp_path / "remote", server.url, 1)
        runs.folder.mkdir()
        seen: list[list[int]] = []
        checkpoint = None
        for stop, (ranks, workers) in zip([4, 9, 12], [(2, 1), (4, 0), (1, 2)], strict=True):
            out = runs.segment(ranks, workers, stop, checkpoint)
            seen += micro_steps(out)
            checkpoint = out / f"step={stop}.ckpt"
        assert {server.asked[path.name] for path in numbered_shards.glob("*.tar")} == {1}
    assert seen == unbroken


class _Early(Recorder):
    """Asks for the training length while the optimizer is built, which loads the training data early."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


class _Failing(Recorder):
    """Fails within the step of the sixth batch."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        if self.global_step == 5:
            raise KeyError("a fault in the step")
        return super().training_step(batch, batch_index)


def settings(shards: Path, folder: Path, steps: int, **more: Any) -> dict[str, Any]:
    """One rank in this process; checkpoints and records under `folder`."""
    folder.mkdir()
    return {
        "shards": str(shards),
        "ranks": 1,
        "workers": 0,
        "batch_size": BATCH,
        "accumulate": 1,
        "max_steps": steps,
        "checkpoints": str(folder),
        "record": str(folder / "record"),
        **more,
    }


# Lightning's own remarks about so small a run.
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec, LeafSpec")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:.*weights_only", "ignore:.*exists and is not empty")
@pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:.*(called without a model|no last checkpoint)"
)
class TestOneRank:
    def test_a_run_can_stop_after_any_step(self, tmp_path: Path, numbered_shards: Path) -> None:
        steps = 14
        run(settings(numbered_shards, tmp_path / "unbroken", steps))
        unbroken = micro_steps(tmp_path / "unbroken")
        for stop in range(1, steps):
            checkpoint = str(tmp_path / "unbroken" / f"step={stop}.ckpt")
            resumed = settings(numbered_shards, tmp_path / str(stop), steps, resume=checkpoint)
            run({**resumed, "save_every": steps})
            assert micro_steps(tmp_path / str(stop)) == unbroken[stop:]

    def test_the_state_is_one_index_without_a_rank(self, tmp_path: Path, numbered_shards: Path) -> None:
        run(settings(numbered_shards, tmp_path / "run", 5))
        state = torch.load(tmp_path / "run" / "step=5.ckpt", weights_only=True)["TextDataModule"]
        assert state["next_index"] == 5 * BATCH
        assert state["tokenizer"] == {"kind": "bytes"}

    def test_loading_the_data_early_does_not_lose_the_position(
        self, tmp_path: Path, numbered_shards: Path
    ) -> None:
        run(settings(numbered_shards, tmp_path / "first", 9), _Early)
        checkpoint = str(tmp_path / "first" / "step=4.ckpt")
        run(settings(numbered_shards, tmp_path / "second", 9, resume=checkpoint), _Early)
        assert micro_steps(tmp_path / "second") == micro_steps(tmp_path / "first")[4:]

    def test_epochs_cut_short_go_on_where_they_stopped(self, tmp_path: Path, numbered_shards: Path) -> None:
        run(settings(numbered_shards, tmp_path / "whole", 10))
        run(settings(numbered_shards, tmp_path / "cut", 10, limit_train_batches=4))
        assert micro_steps(tmp_path / "cut") == micro_steps(tmp_path / "whole")
        checkpoint = str(tmp_path / "cut" / "step=6.ckpt")
        run(settings(numbered_shards, tmp_path / "on", 10, limit_train_batches=4, resume=checkpoint))
        assert micro_steps(tmp_path / "on") == micro_steps(tmp_path / "whole")[6:]

    def test_another_batch_size_goes_on_at_the_same_sample(
        self, tmp_path: Path, numbered_shards: Path
    ) -> None:
        run(settings(numbered_shards, tmp_path / "whole", 10))
        checkpoint = str(tmp_path / "whole" / "step=4.ckpt")
        run(settings(numbered_shards, tmp_path / "on", 10, batch_size=2, accumulate=2, resume=checkpoint))
        samples = list(itertools.chain(*micro_steps(tmp_path / "whole")))
        continued = list(itertools.chain(*micro_steps(tmp_path / "on")))
        # 13 batches of two make an epoch of 14, so that its last step has both of its batches too.
        assert continued == samples[4 * BATCH :]

    def test_overfitting_on_an_endless_stream_is_refused(self, tmp_path: Path, numbered_shards: Path) -> None:
        with pytest.raises(ValueError, match="overfit_batches is 2: training reads an endless stream"):
            run(settings(numbered_shards, tmp_path / "run", 4, overfit_batches=2))

    def test_a_batch_whose_step_failed_comes_again(self, tmp_path: Path, numbered_shards: Path) -> None:
        run(settings(numbered_shards, tmp_path / "whole", 8))
        rescued = tmp_path / "rescued.ckpt"
        with pytest.raises(KeyError):
            run(settings(numbered_shards, tmp_path / "failed", 8, save_on_exception=str(rescued)), _Failing)
        run(settings(numbered_shards, tmp_path / "resumed", 8, resume=str(rescued)))
        assert micro_steps(tmp_path / "resumed") == micro_steps(tmp_path / "whole")[5:]

    def test_a_checkpoint_of_other_shards_is_refused(self, tmp_path: Path, numbered_shards: Path) -> None:
        run(settings(numbered_shards, tmp_path / "run", 2))
        (tmp_path / "other.txt").write_text("1234567\n" * 64)
        plan = plan_files([tmp_path / "other.txt"], PackSettings(ByteTokenizer().describe(), 0.25))
        prepare(plan, tmp_path / "other")
        checkpoint = str(tmp_path / "run" / "step=2.ckpt")
        with pytest.raises(ValueError, match="the checkpoint was trained on other data .* shards was"):
            run(settings(tmp_path / "other", tmp_path / "refused", 4, resume=checkpoint))
