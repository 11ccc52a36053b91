"""The Trainer's settings, looked at before anything starts: ranges, what a run cannot do, and intervals in steps."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ProgressBar,
)
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from causalrn.system import check_range
from causalrn.training.callbacks import Checkpoints, LengthExtrapolation, WholeSteps
from causalrn.training.module import LanguageModelModule, logged_names

# Lightning lets these pass, or fails on them after the start; for the others it says itself what it wants.
RANGES = {
    "accumulate_grad_batches": "[1, inf)",
    "check_val_every_n_epoch": "[1, inf)",
    # inf measures the norm and clips nothing, as 0 clips nothing.
    "gradient_clip_val": "[0, inf]",
    "limit_train_batches": "[0, inf)",
    "limit_val_batches": "[0, inf)",
    "log_every_n_steps": "[0, inf)",
    "max_epochs": "[-1, inf)",
    "max_steps": "[-1, inf)",
    "min_epochs": "[0, inf)",
    "min_steps": "[0, inf)",
    "num_nodes": "[1, inf)",
    "num_sanity_val_steps": "[-1, inf)",
    "reload_dataloaders_every_n_epochs": "[0, inf)",
    "val_check_interval": "(0, inf)",
}

# Each sets this key behind the config, so that the run folder would tell of another run.
BESIDE_THE_CONFIG = {
    BatchSizeFinder: "data.init_args.batch_size",
    GradientAccumulationScheduler: "trainer.accumulate_grad_batches",
    LearningRateFinder: "model.init_args.learning_rate",
}
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Looks at each setting by itself; `causalrn.training.strategies.check_run` looks at them together.

    Args:
        settings: arguments of the Trainer, or the section `trainer` of a config.

    Raises:
        ValueError: one is out of its range, or is something that a run cannot do.
    """
    for name, interval in RANGES.items():
        value = settings.get(name)
        # Time intervals are text and mappings, which Lightning reads.
        if isinstance(value, int | float):
            check_range(None, interval, **{f"trainer.{name}": value})
    check_precision(str(settings.get("precision")))
    if method := start_method(settings.get("strategy")):
        raise ValueError(
            f"a strategy that starts its processes by {method} leaves the trained model in them: want trainer.strategy ddp"
        )
    if str(settings.get("gradient_clip_algorithm")) == "value":
        raise ValueError("gradient_clip_algorithm value is not offered: every strategy clips by norm")
    if settings.get("barebones"):
        raise ValueError(
            "trainer.barebones true is not offered: it turns off the loggers and checkpoints that a run folder is made "
            "of; python -m benchmarks overhead measures the Trainer"
        )
    for callback in as_list(settings.get("callbacks")):
        for kind, key in BESIDE_THE_CONFIG.items():
            if isinstance(callback, kind):
                raise ValueError(
                    f"trainer.callbacks {kind.__name__} is not offered: it changes {key} behind the config; set it there"
                )
    for plugin in as_list(settings.get("plugins")):
        if isinstance(plugin, CheckpointIO):
            raise ValueError(
                f"trainer.plugins {type(plugin).__name__} is not offered: checkpoints are written in the background, "
                "complete or not at all, by one of our own; want no CheckpointIO"
            )


def start_method(strategy: Any) -> str | None:
    """How a strategy of a config starts processes within this one (spawn, fork, ...), or None where it does not."""
    if isinstance(strategy, str):
        parts = strategy.replace("notebook", "fork").split("_")
        return next((part for part in parts if part in ("spawn", "fork")), None)
    method = (strategy.get("init_args") or {}).get("start_method") if isinstance(strategy, dict) else None
    return None if method == "popen" else method


def arguments_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's arguments for our settings: intervals in batches, and no callback of what is turned off.

    An int `val_check_interval` counts optimizer steps here, and batches there. A share of an epoch or a time stays.
    """
    arguments = dict(settings)
    interval = settings.get("val_check_interval")
    if isinstance(interval, int):
        arguments["val_check_interval"] = interval * settings.get("accumulate_grad_batches", 1)
    callbacks = as_list(settings.get("callbacks"))
    if settings.get("enable_checkpointing") is False or settings.get("fast_dev_run"):
        # Another one that a config names contradicts the setting, which Lightning says.
        callbacks = [callback for callback in callbacks if type(callback) is not Checkpoints]
    if settings.get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    return {**arguments, "callbacks": [*callbacks, WholeSteps(interval)]}


def as_list(value: Any) -> list[Any]:
    """A setting that the Trainer takes as one object or as several."""
    return [] if value is None else [*value] if isinstance(value, list | tuple) else [value]


def make_profiler(profiler: Any, folder: Path) -> Any:
    """The profiler of a setting; one that is named writes its report into the folder, not into Lightning's log."""
    named = PROFILERS.get(profiler) if isinstance(profiler, str) else None
    return profiler if named is None else named(dirpath=folder, filename="profile")


def warn_without_effect(settings: Mapping[str, Any]) -> None:
    """Says of settings that a run decides itself that they change nothing."""
    if settings.get("default_root_dir"):
        print(
            f"warning: trainer.default_root_dir {settings['default_root_dir']} has no effect; want --run_dir",
            file=sys.stderr,
        )
    if settings.get("logger") is False:
        print(
            "warning: trainer.logger false has no effect: a run folder always has its metrics",
            file=sys.stderr,
        )


def check_precision(precision: str) -> None:
    """Raises a ValueError for those that the relation, or its checkpoints, cannot be held in."""
    if precision.startswith("16"):
        raise ValueError(
            f"precision {precision} is too narrow: the relation's exp reaches e^sqrt(D-1), beyond float16 from D of "
            "about 125 on; want bf16-mixed or 32-true"
        )
    if precision.startswith("transformer-engine"):
        raise ValueError(
            f"precision {precision} is not offered: it replaces linear layers by others whose checkpoints no command "
            "reads; want bf16-mixed or 32-true"
        )


def check_trainer(trainer: L.Trainer, module: LanguageModelModule, data: Any) -> None:
    """Looks at what a Trainer became: the precision, which a plugin may have set, and what its callbacks monitor.

    Where a callback or a module of the user's own may log, nothing can be said of a monitor before it does.

    Raises:
        ValueError: float16, or nothing logs a monitored name.
    """
    check_precision(trainer.precision)
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    ours = ("causalrn", "datamodules", "lightning")
    if any(type(one).__module__.partition(".")[0] not in ours for one in (module, *callbacks)):
        return
    names = logged_names(data)
    training = ["train/loss", "train/grad_norm", "train/skipped_steps", "data/skipped_samples"]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is None or monitor in (*names, *training, "epoch", "step") or monitor.startswith("lr-"):
            continue
        # At lengths other than those of the validation sets the names end in the length.
        ladder = any(isinstance(one, LengthExtrapolation) for one in callbacks)
        if not (ladder and monitor.startswith("val/") and monitor.count("/") > 1):
            raise ValueError(
                f"{type(callback).__name__}: nothing logs its monitor {monitor}: want one of {', '.join(names)}"
            )
