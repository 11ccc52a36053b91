"""Checks a run before it is queued: its config is read as the run will read it, and held against its ranks."""

import importlib.util
from pathlib import Path
from typing import Any

from causalrn.cli import CLI
from causalrn.sweeps.points import build_objects
from causalrn.training.resume import check_unused, flag_value, plan_start
from datamodules.fetch import copies_folder, is_address
from datamodules.ranges import check_batch_size
from datamodules.shards import Manifest, fetch_manifest
from launch.job import Job


def read_config(arguments: list[str]) -> dict[str, Any]:
    """The resolved config of a causalrn.fit command, as its run folder will hold it.

    Raises:
        ValueError: the Trainer, the model or the data would refuse their settings.
    """
    cli = CLI(arguments)
    build_objects(cli.config, cli.parser.instantiate_classes)
    if flag_value(cli.arguments, "--resume"):
        # Its own folder, unless the arguments name another one.
        cli.config["run_dir"] = str(plan_start(cli.arguments, None).run_dir)
    return cli.resolved


def check(config: dict[str, Any], job: Job, run_dir: Path) -> list[str]:
    """Raises a ValueError for what would end the job after it has waited in the queue; returns what was checked."""
    return [
        check_devices(config["trainer"], job),
        check_strategy(config["trainer"]),
        check_batch(config, job),
        check_shards(config["data"]),
        check_run_dir(run_dir, continues=config["resume"] is not None),
    ]


def check_devices(trainer: dict[str, Any], job: Job) -> str:
    """The script passes nodes and devices on; a config that says otherwise means another job."""
    for name, wanted in (("num_nodes", job.nodes), ("devices", job.tasks_per_node)):
        value = trainer[name]
        if value not in ("auto", wanted) and not (name == "num_nodes" and value == 1):
            raise ValueError(
                f"trainer.{name} is {value} and the job has {wanted}; want the same, or leave it out of the config"
            )
    if job.ranks > 1 and trainer["strategy"] == "auto" and not job.gpus_per_node:
        raise ValueError(
            f"{job.ranks} tasks and trainer.strategy auto; want one that trains on several processes, as "
            "--config configs/trainer/ddp.yaml"
        )
    if trainer["accelerator"] in ("gpu", "cuda") and not job.gpus_per_node:
        raise ValueError(
            f"trainer.accelerator is {trainer['accelerator']} and the job has no GPUs; want --gpus-per-node"
        )
    return f"{job.nodes} nodes x {job.tasks_per_node} tasks = {job.ranks} ranks"


def strategy_name(trainer: dict[str, Any]) -> str:
    strategy = trainer["strategy"]
    return strategy if isinstance(strategy, str) else strategy["class_path"]


def check_strategy(trainer: dict[str, Any]) -> str:
    name = strategy_name(trainer)
    if "deepspeed" in name.lower() and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"trainer.strategy {name} needs the package deepspeed; want: pip install 'causalrn[deepspeed]'"
        )
    return f"strategy {name}"


def check_batch(config: dict[str, Any], job: Job) -> str:
    """batch_size counts the samples of a step over all ranks."""
    data = config["data"]["init_args"]
    batch_size, length = data.get("batch_size"), data.get("context_length")
    if "ContextParallel" in strategy_name(config["trainer"]):
        if length is not None and length % job.ranks:
            raise ValueError(
                f"context_length {length} is not divisible by the {job.ranks} ranks that share a sequence"
            )
        return f"context_length {length} over {job.ranks} ranks"
    if batch_size is not None:
        check_batch_size(batch_size, job.ranks)
    return f"batch_size {batch_size} over {job.ranks} ranks"


def check_shards(data: dict[str, Any]) -> str:
    """Local shards must be there; of remote ones the manifest must be readable, which is copied into the cache."""
    settings = data["init_args"]
    # Its former name for an address.
    location = settings.get("shards_url") or settings.get("shards_dir")
    # A corpus of the package is prepared by the run itself.
    if not location or settings.get("corpus"):
        return "no shards"
    folder = Path(location)
    if is_address(location):
        folder = copies_folder(location, settings.get("cache_dir"))
        fetch_manifest(location, folder)
    shards = Manifest.load(folder).splits["train"].shards
    return f"{len(shards)} training shards in {location}"


def check_run_dir(run_dir: Path, continues: bool) -> str:
    if not continues:
        check_unused(run_dir)
    parent = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    probe = parent / ".launch-probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"run folder {run_dir} cannot be written ({error.strerror}); want another --run-dir"
        ) from error
    return f"run folder {run_dir}"
