"""Measures what training-time metrics cost: the share of `Throughput`, `Norms` and their loggers in a run's training loop."""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from benchmarks.common import Lines
from causalrn import fit
from causalrn.training.callbacks import Norms, Throughput
from causalrn.training.config_files import find_config, shipped_configs

HOOKS = (
    (Throughput, "on_train_batch_end"),
    (Norms, "on_before_optimizer_step"),
    (Norms, "on_train_batch_end"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=find_config,
        default=shipped_configs() / "copy/quickstart.yaml",
        help="run to measure",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="sequences per step (default: 64)")
    parser.add_argument("--steps", type=int, default=100, help="steps (default: 100)")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """CPU seconds of the process, which other programs on the machine do not change, with the run's own log interval."""
    spent = {"metrics": 0.0, "training loop": 0.0}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for owner, name in HOOKS:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), spent, "metrics")))
        advance = timed(_TrainingEpochLoop.advance, spent, "training loop")
        stack.enter_context(mock.patch.object(_TrainingEpochLoop, "advance", advance))
        settings = {
            "trainer.max_steps": options.steps,
            "trainer.limit_val_batches": 0,
            "trainer.precision": "32-true",
            "trainer.accelerator": "cpu",
            "data.init_args.batch_size": options.batch_size,
        }
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        fit.main(["--config", str(options.config), *flags, "--run_dir", str(Path(folder, "run"))])
    share = spent["metrics"] / spent["training loop"]
    print(f"{100 * share:.2f} % of the training loop's {spent['training loop']:.1f} s", flush=True)
    record = {
        "benchmark": "metrics",
        "config": options.config.stem,
        "batch_size": options.batch_size,
        "steps": options.steps,
        "cpu_seconds": spent,
        "metrics_share": share,
    }
    return record, {}


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, which adds the process's CPU seconds of each call to `spent`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.process_time() - start

    return call
