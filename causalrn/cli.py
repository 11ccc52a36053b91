"""What the commands share: the config parser, the run folder, and errors as one clear line."""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import lightning as L
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from causalrn.system import Lock
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
from causalrn.training.config_errors import one_line
from causalrn.training.config_files import ConfigParser
from causalrn.training.data_folders import STARTED_IN, placed_folders
from causalrn.training.loggers import MetricsCSV, TensorBoardEvents
from causalrn.training.module import LanguageModelModule
from causalrn.training.resume import OF_A_START, flag_value, name_for_children, plan_start, with_base_config
from causalrn.training.signals import EXIT_INTERRUPTED
from causalrn.training.starts import first_process
from causalrn.training.trackers import MLflowRun, WandbRun
from causalrn.training.trainer import Trainer
from causalrn.training.trainer_settings import make_profiler, warn_without_effect

USER_ERRORS = (ValueError, OSError, MisconfigurationException, ArgumentError)


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml once training begins: what fails before must not change the config of a run that was there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # For a run that continues at its last step.
        super().setup(trainer, pl_module, "fit")


class CausalRNCLI(LightningCLI):
    """Reads --config files (later ones override earlier ones), prepares the run folder, builds all objects.

    Besides Lightning's groups `trainer`, `model` and `data` it takes:
        --run_dir: folder of the run; by default runs/NAME/TIME, with NAME from the first config file.
        --resume: a run folder, or a checkpoint, to continue, in the same folder unless --run_dir names another; its
            config is read first, so that no --config is needed.
        --init_from: a checkpoint, or a run folder, whose weights a new run begins with.
    """

    lock: Lock | None = None

    def __init__(self, args: list[str] | None = None) -> None:
        self.arguments = sys.argv[1:] if args is None else args
        quiet_libraries()
        with with_base_config(self.arguments) as arguments:
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
                args=arguments,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
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

    def before_instantiate_classes(self) -> None:
        self.start = plan_start(self.arguments, self.config["run_dir"])
        self.run_dir = self.start.run_dir
        self.checkpoint = self.start.checkpoint
        if first_process():
            self.lock = hold(self.run_dir)
        if self.checkpoint is not None:
            settings = self.config["data"].get("init_args", {})
            for name, folder in placed_folders(settings, read_head(self.checkpoint).get(STARTED_IN)).items():
                settings[name] = folder
        name_for_children(self.run_dir)
        self.config["run_dir"] = str(self.run_dir)
        for name in OF_A_START:
            if self.config[name] and not flag_value(self.arguments, f"--{name}"):
                warnings.warn(
                    f"{name}: {self.config[name]} in a config file is left aside: want --{name} on the command line",
                    stacklevel=2,
                )
            # What is kept must not send another start, of this run or of one that uses its config, elsewhere.
            self.config[name] = None

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets others have the run folder."""
        if self.lock is not None:
            self.lock.release()
            # A run that failed before it left anything leaves no folder either.
            with contextlib.suppress(OSError):
                self.run_dir.rmdir()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.resolved: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        loggers = self.config_init["trainer"]["logger"]
        kwargs["logger"] = [
            # A resumed run knows its checkpoints by their absolute paths.
            MetricsCSV(str(self.run_dir.absolute())),
            TensorBoardEvents(str(self.run_dir.absolute())),
            *(
                loggers
                if isinstance(loggers, list)
                else [loggers]
                if loggers not in (None, True, False)
                else []
            ),
        ]
        for logger in kwargs["logger"]:
            if isinstance(logger, WandbRun | MLflowRun):
                logger.use_run(self.run_dir, self.resolved)
        if first_process():
            warn_without_effect(self.config_init["trainer"])
        kwargs["default_root_dir"] = str(self.run_dir.absolute())
        kwargs["profiler"] = make_profiler(self.config_init["trainer"]["profiler"], self.run_dir)
        callbacks = self.config_init["trainer"]["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        # A config's own callback of a kind takes the place of the default one.
        extra: list[tuple[type[Callback], Callback]] = [
            (RunFolder, RunFolder(self.run_dir, self.resolved, str(self.start))),
            (FiniteLoss, FiniteLoss()),
            (Norms, Norms()),
            (Throughput, Throughput()),
            (Heartbeat, Heartbeat()),
            (ConfiguredValues, ConfiguredValues()),
            (ResumedLoops, ResumedLoops()),
            (Preemption, Preemption()),
            # A monitored ModelCheckpoint is added to this one, and takes nothing's place.
            (Checkpoints, Checkpoints()),
            (ProgressBar, progress_bar()),
        ]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and not isinstance(callback, Checkpoints):
                settle(callback)
        given = tuple(type(callback) for callback in callbacks)
        kwargs["callbacks"] = [
            *callbacks,
            *(default for kind, default in extra if not any(issubclass(one, kind) for one in given)),
        ]
        plugins = self.config_init["trainer"]["plugins"] or []
        kwargs["plugins"] = plugins = [*plugins] if isinstance(plugins, list) else [plugins]
        if SLURMEnvironment.detect() and not any(
            isinstance(plugin, ClusterEnvironment) for plugin in plugins
        ):
            # Lightning's own requeueing saves inside the signal handler.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, Trainer)
        trainer.harden()
        return trainer


def hold(run_dir: Path) -> Lock:
    """Keeps other processes out of a run folder, which is made where it is missing.

    Raises:
        ValueError: another process holds it, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return Lock(run_dir / ".lock", f"run folder {run_dir}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"run folder {run_dir} cannot be written ({reason}); want another --run_dir"
        ) from error


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


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake ends the process with one line and exit code 1; CAUSALRN_TRACEBACK=1 shows all of it."""
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get("CAUSALRN_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function with one-line errors; Ctrl-C ends it with exit code 130."""
    try:
        with one_line_errors():
            main()
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except SystemExit as stop:
        # Lightning's own answer to it is exit code 1.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise SystemExit(EXIT_INTERRUPTED) from None
        raise
