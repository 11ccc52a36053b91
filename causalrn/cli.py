"""What the commands share: the config parser, the run folder, and errors as one clear line."""

import itertools
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from causalrn.callbacks import (
    Checkpoints,
    FiniteLoss,
    Heartbeat,
    Norms,
    Preemption,
    ResumedLoops,
    RunFolder,
    Throughput,
    progress_bar,
)
from causalrn.callbacks.checkpoints import settle
from causalrn.checkpoint import newest_checkpoint
from causalrn.lit_module import LanguageModelModule
from causalrn.loggers import MetricsCSV, TensorBoardEvents
from causalrn.run_lock import RunLock
from causalrn.sharded import is_sharded
from causalrn.starts import first_process, is_continued, job_name
from causalrn.trackers import MLflowRun, WandbRun
from causalrn.trainer import Trainer

# The first process of a run names the folder for the ranks that it starts.
RUN_DIR_VARIABLE = "CAUSALRN_RUN_DIR"
USER_ERRORS = (ValueError, OSError, MisconfigurationException, ArgumentError)


class CausalRNCLI(LightningCLI):
    """Reads --config files (later ones override earlier ones), prepares the run folder, builds all objects.

    Besides Lightning's groups `trainer`, `model` and `data` it takes:
        --run_dir: folder of the run; by default runs/NAME/TIME, with NAME from the first config file.
        --resume: a run folder, or one of its checkpoints, to continue in the same folder; its config.yaml is
            read first, so that no --config is needed.
    """

    lock: RunLock | None = None

    def __init__(self, args: list[str] | None = None) -> None:
        arguments = resume_arguments(sys.argv[1:] if args is None else args)
        check_syntax(arguments)
        quiet_libraries()
        super().__init__(
            model_class=LanguageModelModule,
            subclass_mode_model=True,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            save_config_callback=SaveConfigCallback,
            # A resumed run finds its own config there.
            save_config_kwargs={"overwrite": True},
            seed_everything_default=1,
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
            run=False,
            auto_configure_optimizers=False,
            # A checkpoint describes its network itself, see causalrn.checkpoint.
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False, "description": "Trains a model as a config says."},
            args=arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, default=None, help="folder of the run")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="run folder or checkpoint to continue from"
        )

    def before_instantiate_classes(self) -> None:
        self.checkpoint = find_checkpoint(self.config["resume"]) if self.config["resume"] else None
        self.run_dir = choose_run_dir(self.config, self.checkpoint)
        if first_process():
            check_unused(self.run_dir, self.checkpoint)
            self.lock = RunLock(self.run_dir)
        if self.checkpoint is None and is_continued(self.run_dir):
            self.checkpoint = newest_checkpoint(self.run_dir / "checkpoints")
        os.environ[RUN_DIR_VARIABLE] = str(self.run_dir)
        self.config["run_dir"] = str(self.run_dir)

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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        loggers = self.config_init["trainer"]["logger"]
        kwargs["logger"] = [
            MetricsCSV(str(self.run_dir)),
            TensorBoardEvents(str(self.run_dir)),
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
                logger.use_run(self.run_dir, config)
        kwargs["default_root_dir"] = str(self.run_dir)
        callbacks = self.config_init["trainer"]["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        # A config's own callback of a kind takes the place of the default one.
        extra: list[tuple[type[Callback], Callback]] = [
            (RunFolder, RunFolder(self.run_dir, config)),
            (FiniteLoss, FiniteLoss()),
            (Norms, Norms()),
            (Throughput, Throughput()),
            (Heartbeat, Heartbeat()),
            (ResumedLoops, ResumedLoops()),
            (Preemption, Preemption()),
            # A monitored ModelCheckpoint is added to this one, and takes nothing's place.
            (Checkpoints, Checkpoints()),
        ]
        if self.config_init["trainer"].get("enable_progress_bar") is not False:
            extra.append((ProgressBar, progress_bar()))
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


def resume_arguments(arguments: list[str]) -> list[str]:
    """With --resume, the run's own config.yaml read before everything else."""
    for index, argument in enumerate(arguments):
        if argument == "--resume" and index + 1 < len(arguments):
            target = Path(arguments[index + 1])
        elif argument.startswith("--resume="):
            target = Path(argument.removeprefix("--resume="))
        else:
            continue
        config = run_dir_of(find_checkpoint(str(target))) / "config.yaml"
        if not config.is_file():
            raise FileNotFoundError(f"--resume {target}: no {config}; want a run folder made by causalrn.fit")
        return ["--config", str(config), *arguments]
    return arguments


def check_syntax(arguments: list[str]) -> None:
    """Raises a ValueError that names the --config file which is no YAML: the parser's own report does not."""
    for flag, path in itertools.pairwise(arguments):
        if flag in ("-c", "--config") and Path(path).is_file():
            try:
                yaml.safe_load(Path(path).read_text())
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"config {path} is no YAML: {error}") from error


def find_checkpoint(target: str) -> Path:
    """The checkpoint that --resume names: itself, or the newest of a run folder."""
    path = Path(target)
    if path.is_file() or is_sharded(path):
        return path
    newest = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise FileNotFoundError(
            f"--resume {target}: no checkpoint there; want a .ckpt or a run folder with checkpoints/"
        )
    return newest


def run_dir_of(checkpoint: Path) -> Path:
    return checkpoint.absolute().parent.parent


def choose_run_dir(config: Namespace, checkpoint: Path | None) -> Path:
    """The folder of this run."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and (named := os.environ.get(RUN_DIR_VARIABLE)):
        return Path(named)
    if checkpoint is not None:
        return run_dir_of(checkpoint)
    if config.run_dir:
        return Path(config.run_dir)
    configs = config.get("config") or []
    name = Path(str(configs[0])).with_suffix("").name if configs else "run"
    parent = Path(str(configs[0])).parent.name if configs else ""
    name = f"{parent}-{name}" if parent else name
    return Path("runs") / name / (job_name() or time.strftime("%Y%m%d-%H%M%S"))


def check_unused(run_dir: Path, checkpoint: Path | None) -> None:
    """A new run never gets a folder that holds another one.

    Raises:
        ValueError: the folder holds a run already, and this one does not continue it.
    """
    if checkpoint is None and (run_dir / "config.yaml").exists() and not is_continued(run_dir):
        raise ValueError(
            f"run_dir {run_dir} holds a run already; want an empty folder, or --resume {run_dir}"
        )


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


def one_line(message: str) -> str:
    """The message on one line; of a parser's report only the part that says what is wrong where."""
    message = " ".join(message.split())
    *_, message = message.rpartition("Errors: - ")
    message, *_ = message.partition(" - Expected a ")
    return re.sub(r"Problem with given class_path '([\w.]+\.)?(\w+)': ", r"\2: ", message)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function with one-line errors; Ctrl-C ends it with exit code 130."""
    try:
        with one_line_errors():
            main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
