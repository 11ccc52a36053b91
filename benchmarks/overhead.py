"""Times what the framework adds to a step: `causalrn.fit` against a bare PyTorch loop of the same model, interleaved."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

from benchmarks.common import Lines
from causalrn.cli import CLI
from causalrn.models import LanguageModel
from causalrn.training.config_files import shipped_configs
from datamodules.tasks.copying import CopyDataModule

CONFIG = shipped_configs() / "copy" / "quickstart.yaml"
# A validation per run would be counted as neither's.
WARM_UP_STEPS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender (default: 10)")
    parser.add_argument("--steps", type=int, default=50, help="timed steps per turn (default: 50)")
    parser.add_argument("--batch-size", type=int, default=64, help="strings per step (default: 64)")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """Medians over the turns, and what the framework adds to a step in seconds and as a share.

    Both contenders train the quickstart's model on the same batches with the same optimizer, clipping and schedule;
    the run saves and logs as it does by default.
    """
    ours, bare, saving = [], [], []
    for _ in range(options.rounds):
        seconds, model, saved = time_fit(options)
        ours.append(seconds)
        saving.append(saved)
        bare.append(time_bare_loop(model, options))
    overhead = [one - other for one, other in zip(ours, bare, strict=True)]
    record = {
        "benchmark": "overhead",
        "batch_size": options.batch_size,
        "steps": options.steps,
        "rounds": options.rounds,
        "seconds_per_step": {"causalrn.fit": statistics.median(ours), "bare loop": statistics.median(bare)},
        "overhead_seconds_per_step": statistics.median(overhead),
        "overhead_share": statistics.median(overhead) / statistics.median(bare),
        # What a checkpoint holds training up for: the copy into memory, not the write.
        "seconds_per_checkpoint": statistics.median(saving),
    }
    for name, seconds in record["seconds_per_step"].items():
        print(f"{name:<14} {1000 * seconds:8.2f} ms per step", flush=True)
    print(f"{'the difference':<14} {1000 * record['overhead_seconds_per_step']:8.2f} ms per step", flush=True)
    return record, {}


class Clock:
    """Reads the time around the steps of a run, from within its own training step."""

    def __init__(self, cli: CLI) -> None:
        self.starts: list[float] = []
        self.step = cli.model.training_step
        cli.model.training_step = self.timed

    def timed(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.starts.append(time.perf_counter())
        return self.step(batch, batch_idx)

    @property
    def seconds_per_step(self) -> float:
        timed = self.starts[WARM_UP_STEPS:]
        return (timed[-1] - timed[0]) / (len(timed) - 1)


def time_fit(options: argparse.Namespace) -> tuple[float, LanguageModel, float]:
    """Mean seconds between the beginnings of steps, the trained model, and the seconds one checkpoint takes."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "trainer.max_steps": WARM_UP_STEPS + options.steps + 1,
            "trainer.limit_val_batches": 0,
            "trainer.accelerator": "cpu",
            "trainer.devices": 1,
            "data.init_args.batch_size": options.batch_size,
        }
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        with CLI(["--config", str(CONFIG), *flags, "--run_dir", f"{folder}/run"]).open() as cli:
            clock = Clock(cli)
            cli.trainer.fit(cli.model, cli.datamodule)
            start = time.perf_counter()
            cli.trainer.save_checkpoint(Path(folder, "run", "checkpoints", "timed.ckpt"))
            saved = time.perf_counter() - start
            cli.trainer.strategy.checkpoint_io.teardown()
            return clock.seconds_per_step, cli.model.network, saved


def time_bare_loop(model: LanguageModel, options: argparse.Namespace) -> float:
    """Mean seconds of a step of a loop without a framework, over the same data and with the same optimizer."""
    settings = yaml.safe_load(CONFIG.read_text())
    data = CopyDataModule(**{**settings["data"]["init_args"], "batch_size": options.batch_size})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    model.train()
    starts = []
    for step, batch in enumerate(data.train_dataloader()):
        starts.append(time.perf_counter())
        if step == WARM_UP_STEPS + options.steps:
            break
        loss = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return (starts[-1] - starts[WARM_UP_STEPS]) / (len(starts) - 1 - WARM_UP_STEPS)
