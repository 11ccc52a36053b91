"""Decides what a run begins with: --resume, --init_from, or the same command started again."""

import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml

from causalrn.system import write_json
from causalrn.training.checkpoint import named_checkpoint, newest_checkpoint, progress, read_training
from causalrn.training.checkpoint_io import PREEMPTED
from causalrn.training.config_files import read_mapping
from causalrn.training.consolidate import is_sharded

# The first process of a run names the folder for the ranks that it starts, beside its own number: whatever else
# inherits the variable, or a later run of a process that trains more than one, must not take it for its own.
RUN_DIR_VARIABLE = "CAUSALRN_RUN_DIR"
# Says which other run this one continues or got its weights from.
ORIGIN = "origin.json"
# Arguments of one start: a config that holds them would send the next start elsewhere.
OF_A_START = ("resume", "init_from")
CONFIG_FLAGS = ("--config", "-c")
# Lightning and torchrun, torchrun alone, and srun set these for each process.
RANK_VARIABLES = ("LOCAL_RANK", "RANK", "SLURM_PROCID")
# SLURM and torchrun count in these how often they have started this job again.
RESTART_VARIABLES = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Args:
        run_dir: its folder.
        checkpoint: what it continues from, or None.
        weights: the checkpoint whose weights it begins with, or None for fresh ones.
        origin: what tells a later start of the same command that this folder is its own, or None.
    """

    run_dir: Path
    checkpoint: Path | None = None
    weights: Path | None = None
    origin: dict[str, str] | None = None

    def __str__(self) -> str:
        """Names what the run begins with; ranks that agree give the same name, wherever each has mounted the folder."""
        if self.checkpoint is not None:
            return self.checkpoint.name
        return f"the weights of {self.weights.name}" if self.weights is not None else "fresh weights"

    def note_origin(self) -> None:
        """Leaves in the run folder where the run comes from."""
        path = self.run_dir / ORIGIN
        # A new run has no past, whatever a start that failed has left here.
        noted = (read_mapping(self.run_dir / ORIGIN) if self.checkpoint else {}) | (self.origin or {})
        if not noted:
            path.unlink(missing_ok=True)
        else:
            write_json(path, noted)


def plan_start(arguments: list[str], run_dir: str | None) -> Start:
    """Decides how a run begins, without writing anything.

    A command that is started again, by a scheduler or by hand, continues from the newest checkpoint of its own folder,
    whatever it began with.

    Args:
        arguments: of the command line.
        run_dir: what they and the configs say of it.

    Raises:
        FileNotFoundError: no checkpoint where one is named.
        ValueError: the folder holds another run, or one that is further on than the checkpoint.
    """
    if target := flag_value(arguments, "--resume"):
        return plan_resume(target, arguments)
    folder = choose_run_dir(run_dir, arguments)
    source = flag_value(arguments, "--init_from")
    origin = origin_of("init_from", source) if source else None
    # A run that a signal has ended leaves such a checkpoint.
    preempted = any((folder / "checkpoints").glob(f"{PREEMPTED}*.ckpt"))
    again = is_restarted() or (preempted and comes_from(folder, origin or {}))
    if again and (newest := newest_checkpoint(folder / "checkpoints")):
        return Start(folder, newest)
    if not again:
        check_unused(folder)
    return Start(folder, weights=find_checkpoint("--init_from", source) if source else None, origin=origin)


def plan_resume(target: str, arguments: list[str]) -> Start:
    home = run_folder_of(Path(target))
    # A config's run_dir is that of the run that it was kept by.
    run_dir = choose_run_dir(flag_value(arguments, "--run_dir") or (home and str(home)), arguments)
    in_place = home is not None and run_dir.resolve() == home.resolve()
    if in_place and is_run_folder(Path(target)):
        return Start(run_dir, find_checkpoint("--resume", target))
    origin = origin_of("resume", target)
    again = is_restarted() or comes_from(run_dir, origin)
    newest = newest_checkpoint(run_dir / "checkpoints")
    if in_place:
        checkpoint = find_checkpoint("--resume", target)
        if newest is None or progress(newest) <= progress(checkpoint):
            return Start(run_dir, checkpoint, origin=origin)
        if again:
            return Start(run_dir, newest)
        raise ValueError(
            f"--resume {target}: its run has gone on to step {progress(newest)[0]}; want --resume {run_dir} to "
            "continue that, or another --run_dir to begin there at this checkpoint"
        )
    if again and newest is not None:
        return Start(run_dir, newest)
    if not again:
        check_unused(run_dir)
    return Start(run_dir, find_checkpoint("--resume", target), origin=origin)


def with_base_config(arguments: list[str]) -> list[str]:
    """The arguments; with --resume, the run's own config comes before everything else.

    Raises:
        FileNotFoundError: no checkpoint where one is named.
        ValueError: --init_from is given too, or the checkpoint holds no config and has none beside it.
    """
    target = flag_value(arguments, "--resume")
    if target is None:
        return arguments
    if flag_value(arguments, "--init_from"):
        raise ValueError(
            "--resume and --init_from exclude each other: want --resume to continue a run, or --init_from to begin "
            "a new one with its weights"
        )
    own = Path(flag_value(arguments, "--run_dir") or target)
    # A later start of the same command needs no more than the run's own folder.
    again = is_restarted() or comes_from(own, origin_of("resume", target))
    for folder in (own if again else None, run_folder_of(Path(target))):
        if folder is not None and (path := folder / "config.yaml").is_file():
            return ["--config", str(path), *arguments]
    config = read_training(find_checkpoint("--resume", target)).get("config")
    if config is not None:
        kept = {key: value for key, value in config.items() if key not in ("run_dir", *OF_A_START)}
        # The text itself, which the parser takes in place of a file's name.
        return ["--config", yaml.safe_dump(kept), *arguments]
    if flag_values(arguments, *CONFIG_FLAGS):
        return arguments
    raise ValueError(
        f"--resume {target}: the checkpoint holds no config, nor is one beside it; want --config"
    )


def flag_values(arguments: list[str], *flags: str) -> list[str]:
    """The values that a command line gives a flag, which may go by several names."""
    values = []
    for argument, following in pairwise([*arguments, None]):
        assert argument is not None
        if argument in flags and following is not None:
            values.append(following)
        name, equals, value = argument.partition("=")
        if equals and name in flags:
            values.append(value)
    return values


def flag_value(arguments: list[str], flag: str) -> str | None:
    """The value that counts of those that a command line gives a flag: the last one."""
    return next(reversed(flag_values(arguments, flag)), None)


def find_checkpoint(flag: str, target: str) -> Path:
    """The checkpoint that a flag names: itself, or the newest of a run folder."""
    try:
        return named_checkpoint(target)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{flag} {target}: no checkpoint there; want a .ckpt or a run folder with checkpoints/"
        ) from None


def is_run_folder(path: Path) -> bool:
    return path.is_dir() and not is_sharded(path)


def run_folder_of(target: Path) -> Path | None:
    """The run folder that is named, or in which a named checkpoint lies; None for a checkpoint that lies elsewhere."""
    if is_run_folder(target):
        return target.absolute()
    folder = target.absolute().parent
    return (
        folder.parent if folder.name == "checkpoints" and (folder.parent / "config.yaml").exists() else None
    )


def choose_run_dir(given: str | None, arguments: list[str]) -> Path:
    """The folder of this run: the given one, or a new one that is named after the first config file."""
    if (named := run_dir_of_parent()) is not None:
        return named
    if given:
        return Path(given)
    configs = [Path(path) for path in flag_values(arguments, *CONFIG_FLAGS)]
    name = configs[0].with_suffix("").name if configs else "run"
    parent = configs[0].parent.name if configs else ""
    name = f"{parent}-{name}" if parent else name
    return Path("runs") / name / (job_name() or time.strftime("%Y%m%d-%H%M%S"))


def name_for_children(run_dir: Path) -> None:
    """Tells the ranks that this process starts, as Lightning does where there is no launcher, which folder it has chosen."""
    os.environ[RUN_DIR_VARIABLE] = f"{os.getpid()}:{run_dir}"


def run_dir_of_parent() -> Path | None:
    """The folder that the first rank has chosen, where that process has started this one."""
    parent, _, run_dir = os.environ.get(RUN_DIR_VARIABLE, "").partition(":")
    started_by_it = os.environ.get("LOCAL_RANK", "0") != "0" and parent == str(os.getppid())
    return Path(run_dir) if started_by_it else None


def check_unused(run_dir: Path) -> None:
    """A new run never gets a folder that holds another one.

    Raises:
        ValueError: the folder holds a run already.
    """
    if (run_dir / "config.yaml").exists():
        raise ValueError(
            f"run_dir {run_dir} holds a run already; want an empty folder, or --resume {run_dir}"
        )


def origin_of(flag: str, target: str) -> dict[str, str]:
    return {flag: str(Path(target).absolute())}


def comes_from(run_dir: Path, origin: dict[str, str]) -> bool:
    """Whether the run of a folder was begun by a command that says so."""
    return origin.items() <= read_mapping(run_dir / ORIGIN).items()


def first_process() -> bool:
    """Whether this is the process of a run that writes its folder; known before the processes know each other."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


def job_name() -> str | None:
    """A name for the run folder that all processes of a job, and all its starts, agree on."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"job_{job}"
    if job := os.environ.get("TORCHELASTIC_RUN_ID"):
        # "none" is torchrun's default: its processes share their parent then.
        return f"torchrun_{os.getppid() if job == 'none' else job}"
    return None


def is_restarted() -> bool:
    """Whether SLURM or torchrun has started this very command before."""
    return any(os.environ.get(name, "0") != "0" for name in RESTART_VARIABLES)
