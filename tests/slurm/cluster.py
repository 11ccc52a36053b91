"""A real SLURM of two nodes on this machine: `python -m tests.slurm.cluster install | start FOLDER | stop FOLDER`."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ["slurm-wlm", "munge"]
START_SECONDS = 180


class Cluster:
    """slurmctld and two slurmd on ports of their own, with a munged of their own, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What makes sbatch and the others speak to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}

    def start(self) -> None:
        """Raises a RuntimeError with the logs where the nodes do not come up."""
        for name in ("state", "spool-n0", "spool-n1"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        # munged wants its files in folders that nobody else can write.
        self.folder.chmod(0o755)
        key.chmod(0o400)
        (self.folder / "slurm.conf").write_text(self.configuration())
        munged = ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket"]
        self.daemon(
            *munged,
            f"--key-file={key}",
            *(f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")),
        )
        self.wait_for("munged", lambda: (self.folder / "munge.socket").exists())
        self.daemon("slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf"))
        for node in ("n0", "n1"):
            self.daemon("slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))
        self.wait_for("the nodes", lambda: self.ask("sinfo", "-h", "-o", "%T %D") == "idle 2")

    def daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{len(self.daemons)}.out").open("wb")
        with log:
            self.daemons.append(
                subprocess.Popen(
                    command, stdout=log, stderr=log, env=self.environment, start_new_session=True
                )
            )

    def wait_for(self, what: str, ready) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-1000:] for path in self.folder.glob("*.out"))
                raise RuntimeError(f"{what} did not come up within {START_SECONDS} s:\n{logs}")
            time.sleep(0.2)

    def ask(self, *command: str, timeout: float = 60) -> str:
        """What a command of SLURM's prints; always with a timeout, since a drained node makes srun wait for ever."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        return (done.stdout + done.stderr).strip()

    def stop(self) -> None:
        for daemon in reversed(self.daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def configuration(self) -> str:
        host = socket.gethostname()
        ports = [free_port() for _ in range(3)]
        return "\n".join(
            [
                "ClusterName=causalrn",
                f"SlurmctldHost={host}(127.0.0.1)",
                f"SlurmctldPort={ports[0]}",
                "SlurmUser=root",
                "SlurmdUser=root",
                "AuthType=auth/munge",
                # Credentials expire soon, which is what a requeued job waits for.
                f"AuthInfo=socket={self.folder}/munge.socket,cred_expire=5",
                f"StateSaveLocation={self.folder}/state",
                f"SlurmdSpoolDir={self.folder}/spool-%n",
                f"SlurmctldPidFile={self.folder}/slurmctld.pid",
                f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "MpiDefault=none",
                "JobAcctGatherType=jobacct_gather/none",
                "AccountingStorageType=accounting_storage/none",
                "SelectType=select/cons_tres",
                "SelectTypeParameters=CR_Core",
                "SchedulerParameters=batch_sched_delay=0,sched_interval=2",
                "SlurmdParameters=config_overrides",
                "ReturnToService=2",
                "JobRequeue=1",
                "KillWait=30",
                *(
                    f"NodeName=n{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1 + index]} CPUs=2 RealMemory=4000"
                    for index in range(2)
                ),
                "PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP",
                "",
            ]
        )


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def installed() -> bool:
    return all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch"))


def install() -> bool:
    """Installs SLURM from the Debian archive where that is possible; whether it is there."""
    if not installed() and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(
                ["apt-get", *command], env=environment, capture_output=True, timeout=400, check=False
            )
    return installed()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main() -> None:
    action, *folder = sys.argv[1:]
    if action == "install":
        raise SystemExit(
            0 if install() else "SLURM cannot be installed here; want Debian or Ubuntu, and root"
        )
    cluster = Cluster(Path(*folder).absolute())
    if action == "start":
        cluster.start()
        (cluster.folder / "pids").write_text(" ".join(str(daemon.pid) for daemon in cluster.daemons))
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf MASTER_ADDR=127.0.0.1")
    elif action == "stop":
        for pid in (cluster.folder / "pids").read_text().split()[::-1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)


if __name__ == "__main__":
    main()
