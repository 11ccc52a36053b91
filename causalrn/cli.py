"""What the commands share: reading a config, which changes nothing, and opening the run that it describes."""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import lightning as L
import yaml
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from causalrn.training.callbacks import (
    Checkpoints,
    ConfiguredValues,
    FiniteLoss,
    Heartbeat,
    Norms,
    Preemption,
    ResumedLoops,
    RunFolder,
    Throughput,
    progress_bar,
)
from causalrn.training.callbacks.checkpoints import settle
from causalrn.training.checkpoint import read_head
from causalrn.training.config_files import ConfigParser
from causalrn.training.data_folders import STARTED_IN, placed_folders
from causalrn.training.loggers import MetricsCSV, TensorBoardEvents
from causalrn.training.module import LanguageModelModule
from causalrn.training.resume import (
    OF_A_START,
    first_process,
    flag_value,
    name_for_children,
    plan_start,
    with_base_config,
)
from causalrn.training.run_folder import hold
from causalrn.training.trackers import Tracked
from causalrn.training.trainer import Trainer
from causalrn.training.trainer_settings import as_list, check_settings, make_profiler, warn_without_effect

# Each has flags of its own, as --heartbeat.timeout_seconds 600.
DEFAULT_CALLBACKS: dict[str, type[Callback]] = {
    "finite_loss": FiniteLoss,
    "norms": Norms,
    "throughput": Throughput,
    "heartbeat": Heartbeat,
    "checkpoints": Checkpoints,
}


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml once training begins: what fails before must not change the config of a run that was there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A run that continues at its last step begins no training.
        super().setup(trainer, pl_module, "fit")


class CLI(LightningCLI):
    """A command line of `causalrn.fit` and its config files, read and checked; nothing is opened, locked or written.

    Besides Lightning's groups `trainer`, `model` and `data`, and a group for each default callback, it takes:
        --run_dir: folder of the run; by default runs/NAME/TIME, with NAME from the first config file.
        --resume: a run folder, or a checkpoint, to continue, in the same folder unless --run_dir names another; its
            config is read first, so that no --config is needed.
        --init_from: a checkpoint, or a run folder, whose weights a new run begins with.

    `open` begins a run: it locks the run folder and builds `trainer`, `model` and `datamodule`.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        self.began_seconds = time.monotonic()
        self.arguments = respelled(sys.argv[1:] if args is None else args, "-", "_")
        quiet_libraries()
        super().__init__(
            model_class=LanguageModelModule,
            subclass_mode_model=True,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            save_config_callback=SaveConfig,
            # A resumed run finds its own config there.
            save_config_kwargs={"overwrite": True},
            seed_everything_default=1,
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
            run=False,
            auto_configure_optimizers=False,
            # A checkpoint describes its network itself, see causalrn.training.checkpoint.
            load_from_checkpoint_support=False,
            parser_class=ConfigParser,
            parser_kwargs={"exit_on_error": False, "description": "Trains a model as a config says."},
            args=with_base_config(self.arguments),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, kind in DEFAULT_CALLBACKS.items():
            parser.add_class_arguments(kind, name)
        parser.add_argument("--run_dir", type=str | None, default=None, help="folder of the run")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="run folder or checkpoint to continue from"
        )
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="checkpoint whose weights a new run begins with",
        )

    def instantiate_classes(self) -> None:
        """Lightning's constructor calls it; objects are built by `open`, once the run folder is held."""

    @property
    def resolved(self) -> dict[str, Any]:
        """The config as plain data, with every default."""
        return yaml.safe_load(self.parser.dump(self.config, skip_none=False))

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Begins the run: decides where it starts from, holds its folder and builds its objects."""
        self.start = plan_start(self.arguments, self.config["run_dir"])
        with hold(self.start.run_dir) if first_process() else nullcontext():
            before = read_head(self.start.checkpoint) if self.start.checkpoint is not None else {}
            self.first_step = before.get("global_step", 0)
            settings = self.config["data"].get("init_args", {})
            for name, folder in placed_folders(settings, before.get(STARTED_IN)).items():
                settings[name] = folder
            name_for_children(self.start.run_dir)
            self.config["run_dir"] = str(self.start.run_dir)
            self.leave_aside_arguments_of_a_start()
            # Once more: reading the config may have drawn random numbers.
            L.seed_everything(self.config["seed_everything"], workers=True)
            super().instantiate_classes()
            yield self

    def leave_aside_arguments_of_a_start(self) -> None:
        """Takes --resume and --init_from out of the config that is kept: another start would be sent elsewhere by them."""
        for name in OF_A_START:
            if self.config[name] and not flag_value(self.arguments, f"--{name}"):
                warnings.warn(
                    f"{name}: {self.config[name]} in a config file is left aside: want --{name} on the command line",
                    stacklevel=2,
                )
            self.config[name] = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the run's loggers, the default callbacks that the config does not replace, and no requeueing
        but ours."""
        # Once more as plain data: objects that were built from it do not tell all of their arguments.
        check_settings(self.resolved["trainer"])
        settings = self.config_init["trainer"]
        if first_process():
            warn_without_effect(settings)
        run_dir = self.start.run_dir
        trainer = super().instantiate_trainer(
            **kwargs,
            logger=run_loggers(run_dir, self.first_step, self.resolved, as_list(settings["logger"])),
            default_root_dir=str(run_dir.absolute()),
            profiler=make_profiler(settings["profiler"], run_dir),
            callbacks=self.callbacks(as_list(settings["callbacks"])),
            plugins=cluster_plugins(as_list(settings["plugins"])),
        )
        assert isinstance(trainer, Trainer)
        trainer.harden()
        return trainer

    def callbacks(self, given: list[Callback]) -> list[Callback]:
        """The config's own callbacks, and the default ones; a config's own of a kind takes a default one's place."""
        defaults = [
            RunFolder(self.start.run_dir, self.resolved, str(self.start), self.began_seconds),
            *(self.config_init[name] for name in DEFAULT_CALLBACKS),
            ConfiguredValues(),
            ResumedLoops(),
            Preemption(),
            progress_bar(),
        ]
        for callback in given:
            if isinstance(callback, ModelCheckpoint) and not isinstance(callback, Checkpoints):
                settle(callback)
        kinds = {ProgressBar if isinstance(one, ProgressBar) else type(one): one for one in defaults}
        return [*given, *(one for kind, one in kinds.items() if not any(isinstance(g, kind) for g in given))]


def run_loggers(run_dir: Path, first_step: int, config: dict[str, Any], others: list[Any]) -> list[Any]:
    """The run folder's own loggers and those of the config, of which a tracker is told its run."""
    # A resumed run knows its checkpoints by their absolute paths.
    folder = str(run_dir.absolute())
    # true and false are Lightning's own logger, or none.
    others = [logger for logger in others if not isinstance(logger, bool)]
    for logger in others:
        if isinstance(logger, Tracked):
            logger.use_run(run_dir, config)
    return [MetricsCSV(folder, first_step), TensorBoardEvents(folder, first_step), *others]


def cluster_plugins(plugins: list[Any]) -> list[Any]:
    """The config's plugins, and SLURM's environment without Lightning's own requeueing, which saves inside the handler."""
    if SLURMEnvironment.detect() and not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        return [*plugins, SLURMEnvironment(auto_requeue=False)]
    return plugins


class Parser(argparse.ArgumentParser):
    """The parser of a verb without a config: flags are taken with underscores too, as `fit` takes hyphens."""

    # pyright wants the overloads of the parent's annotations.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().parse_known_args(
            respelled(sys.argv[1:] if args is None else args, "_", "-"), namespace
        )


def add_checkpoint(parser: Any, of: str = "a .ckpt of causalrn.fit or causalrn.export") -> None:
    """Adds the flag --checkpoint, which `named_checkpoint` reads."""
    help = f"{of}, or a run folder, whose newest checkpoint is taken"
    parser.add_argument("--checkpoint", type=Path, required=True, help=help)


def whole_numbers(text: str) -> list[int]:
    """Numbers of 1 or more in an argument, as 16,32,64."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"want whole numbers as 16,32,64: got {text!r}") from None
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"want numbers of 1 or more: got {text!r}")
    return numbers


def respelled(arguments: Sequence[str], old: str, new: str) -> list[str]:
    """The arguments, with another character within the names of flags: --run-dir is --run_dir."""
    return [
        "--" + name[2:].replace(old, new) + equals + value if name.startswith("--") else argument
        for argument in arguments
        for name, equals, value in [argument.partition("=")]
    ]


def quiet_libraries() -> None:
    """Leaves the terminal to the run's own lines."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # Lightning's own use of jsonargparse.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # Strings are made, and blocks are mapped, faster than a worker process could hand them over.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning's own use of torch.
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    # Tests and small runs start where SLURM is installed.
    warnings.filterwarnings("ignore", "The `srun` command is available.*")
    # A resumed run continues in its own folder.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    # One that was copied, or continues in another folder, leaves the checkpoints of the first one alone.
    warnings.filterwarnings("ignore", "The dirpath has changed")
    # --resume puts an argument before those of the command line.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended.*")
