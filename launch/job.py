"""The resources of a job and the command it runs, as lines for sbatch or torchrun."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from causalrn.system import check_options

SCRIPT = Path(__file__).with_name("fit.sbatch")
# Each task of an array has a folder of its own.
ARRAY_INDEX = "%a"


@dataclass(frozen=True)
class Job:
    """The resources of a job; names are those of sbatch.

    Raises:
        ValueError: a value that SLURM would not take.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int = 1
    time: str | None = None
    account: str | None = None
    partition: str | None = None
    name: str = "causalrn"
    array: int | None = None

    def __post_init__(self) -> None:
        for interval, *names in (
            ("[1, inf)", "nodes", "tasks_per_node", "array"),
            ("[0, inf)", "gpus_per_node"),
        ):
            check_options(self, interval, *names)
        if self.gpus_per_node and self.gpus_per_node != self.tasks_per_node:
            raise ValueError(
                f"every task drives one GPU: got {self.tasks_per_node} tasks and {self.gpus_per_node} GPUs per node"
            )
        # minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on: sbatch(1), --time.
        if self.time is not None and not re.fullmatch(r"(\d+-)?\d+(:\d{1,2}){0,2}", self.time):
            raise ValueError(f"--time wants minutes, hours:minutes:seconds or days-hours: got {self.time}")

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    def sbatch_command(self, command: list[str], extra: list[str]) -> list[str]:
        """The sbatch command line; the batch script reads its own options below these."""
        options = {
            "--job-name": self.name,
            "--nodes": self.nodes,
            "--ntasks-per-node": self.tasks_per_node,
            "--gpus-per-node": self.gpus_per_node or None,
            "--time": self.time,
            "--account": self.account,
            "--partition": self.partition,
            "--array": f"0-{self.array - 1}" if self.array else None,
        }
        flags = [f"{flag}={value}" for flag, value in options.items() if value is not None]
        return ["sbatch", "--parsable", *flags, *extra, str(SCRIPT), *command]

    def torchrun_command(self, command: list[str]) -> list[str]:
        """The line to run on every node of a cluster without SLURM; HEAD_NODE stands for the first one's address."""
        meeting = (
            ["--standalone"]
            if self.nodes == 1
            else ["--rdzv-backend", "c10d", "--rdzv-endpoint", "HEAD_NODE:29500", "--rdzv-id", self.name]
        )
        size = ["--nnodes", str(self.nodes), "--nproc-per-node", str(self.tasks_per_node)]
        devices = ["--trainer.num_nodes", str(self.nodes), "--trainer.devices", str(self.tasks_per_node)]
        return ["torchrun", *meeting, *size, "-m", "causalrn.fit", *command, *devices]


def shown(command: list[str]) -> str:
    """A command as one may paste it into a shell."""
    return shlex.join(command)
