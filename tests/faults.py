"""Runs of causalrn.fit on several ranks in real processes, into which a fault is put at a chosen step.

Run as `python -m tests.faults STARTS_JSON`: for each start, forks the ranks as torchrun would start them, and prints
their exit codes as a line of JSON. Forked, so that what takes long, the imports, is done once.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch.distributed.fsdp import FSDPModule, fully_shard

from causalrn import fit
from causalrn.models import describe
from causalrn.training import checkpoint_io, signals
from causalrn.training import trainer as trainer_module
from causalrn.training.callbacks import FiniteLoss
from causalrn.training.errors import run_command
from causalrn.training.module import LanguageModelModule
from tests import ROOT
from tests.test_fit import CONFIG

FAULT = "CAUSALRN_TEST_FAULT"
POLL_SECONDS = 0.05
# Faults after which the run is continued from its last checkpoint.
FATAL = ("SIGKILL", "die in the next write")
# Faults of ranks that never end by themselves.
HANGING = ("SIGSTOP", "sleep")


class Fault(L.Callback):
    """What $CAUSALRN_TEST_FAULT says: `kind` at `step` on `rank`, in `where` (setup, train, validation or closing validation)."""

    def __init__(self) -> None:
        self.fault: dict[str, Any] = json.loads(os.environ.get(FAULT, "{}"))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.strike(trainer, pl_module, "setup")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.strike(trainer, pl_module, "train")

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch_idx == 1:
            self.strike(
                trainer, pl_module, "validation" if trainer.state.fn == "fit" else "closing validation"
            )

    def strike(self, trainer: L.Trainer, pl_module: L.LightningModule, where: str) -> None:
        step = self.fault.get("step")
        if self.fault.get("where", "train") != where or step not in (trainer.global_step, "first"):
            return
        if self.fault["rank"] not in (trainer.global_rank, "all"):
            return
        kind = self.fault.pop("kind", None)
        if kind in FATAL:
            wait_for_checkpoint(Path(trainer.default_root_dir, "checkpoints"))
        if kind == "nan":
            with torch.no_grad():
                next(pl_module.parameters())[0] = float("nan")
        elif kind == "sleep":
            time.sleep(600)
        elif kind == "wait for a signal":
            Path(trainer.default_root_dir, "waiting").touch()
            while not (signals.received() or Path(trainer.default_root_dir, "go").exists()):
                time.sleep(POLL_SECONDS)
        elif kind in ("SIGINT twice", "SIGINT thrice"):
            for _ in range(1 + (kind == "SIGINT thrice")):
                os.kill(os.getpid(), signal.SIGINT)
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
            if kind == "SIGINT thrice":
                wait_without_handlers()
        elif kind == "die in the next write":
            checkpoint_io.commit = trainer_module.commit = die_in_the_middle
        elif kind is not None:
            # A scheduler signals all processes of a rank.
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid or os.getpid(), getattr(signal, kind))


def wait_for_checkpoint(folder: Path) -> None:
    """Returns once a checkpoint is on disk: it is written in the background, later than any step on a busy machine."""
    while not (folder / "last.ckpt").exists() or list(folder.glob("*.partial")):
        time.sleep(POLL_SECONDS)


def wait_without_handlers() -> None:
    """As a collective that never ends: in C, where no handler of Python's runs."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def die_in_the_middle(temporary: Path, path: Path, resumable: bool = True) -> None:
    """In place of `commit`: what a kill leaves that comes before the last bytes."""
    file = max(checkpoint_io.files_of(temporary), key=lambda file: file.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


class NoisyCopyModule(LanguageModelModule):
    """Draws random numbers in every step, so that a run depends on the random state of its ranks."""

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (0.5 + torch.rand(()))


class Spiky(FiniteLoss):
    """Sees bad losses on the last rank in two steps."""

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor
    ) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        bad = {3: float("nan"), 6: 1e3}.get(trainer.global_step)
        if bad is not None and trainer.global_rank == trainer.world_size - 1:
            self.losses[-1] = torch.tensor(bad)


class ShardedCopyModule(NoisyCopyModule):
    """Its weights are split over the ranks (FSDP2)."""

    def configure_model(self) -> None:
        if not isinstance(self.network, FSDPModule):
            # Sharding replaces the classes that a description names.
            self.description = describe(self.network)
            assert self.device_mesh is not None
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


def write_config(path: Path, module: str = "NoisyCopyModule", num_workers: int = 0, **trainer: Any) -> Path:
    """A small copy run: 12 steps of two batches, validations of 3 batches after steps 4, 8 and 12."""
    config = {
        "trainer": {
            **CONFIG["trainer"],
            "max_steps": 12,
            "accumulate_grad_batches": 2,
            "val_check_interval": 4,
            "strategy": "ddp",
            "callbacks": [{"class_path": "tests.faults.Fault"}],
            **trainer,
        },
        "model": {**CONFIG["model"], "class_path": f"tests.faults.{module}"},
        "data": {
            **CONFIG["data"],
            "init_args": {**CONFIG["data"]["init_args"], "val_samples": 12, "num_workers": num_workers},
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def start(
    args: list[str], ranks: int = 2, fault: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """One entry of STARTS_JSON; `{rank}` in an argument is the rank's number, `more` sets environment variables."""
    return {"args": args, "ranks": ranks, "fault": fault or {}, "environment": more}


def run_starts(starts: list[dict[str, Any]], timeout: float = 560) -> list[dict[str, Any]]:
    """Exit codes (negative: the signal) by rank, and what the ranks printed, for each start."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults", json.dumps(starts)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        # Ranks that were stopped or hang would outlive the test.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, errors[-3000:]
    return [json.loads(line) for line in output.splitlines()]


def fork_rank(rank: int, entry: dict[str, Any], port: int, log: int) -> int:
    """Starts one rank; its process id."""
    if pid := os.fork():
        return pid
    os.dup2(log, 1)
    os.dup2(log, 2)
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": entry["ranks"],
        "LOCAL_WORLD_SIZE": entry["ranks"],
    }
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GROUP_RANK": 0,
        "TORCHELASTIC_RUN_ID": "test",
    }
    os.environ |= {name: str(value) for name, value in {**ranks, **meeting, **entry["environment"]}.items()}
    os.environ[FAULT] = json.dumps(entry["fault"])
    # Whoever runs the tests may have started them with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        arguments = [argument.replace("{rank}", str(rank)) for argument in entry["args"]]
        run_command(lambda: fit.main([*arguments, "--trainer.devices", str(entry["ranks"])]))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except Exception:  # noqa: BLE001 - whatever it is, it ends this rank
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        # The fork shares the parent's exit handlers.
        os._exit(code)


def main() -> None:
    for entry in json.loads(sys.argv[1]):
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
            port = server.getsockname()[1]
        # Without a name: whoever kills this process leaves nothing behind.
        with tempfile.TemporaryFile("w+") as log:
            pids = {fork_rank(rank, entry, port, log.fileno()): rank for rank in range(entry["ranks"])}
            codes = wait_for_ranks(pids, entry["fault"].get("kind"))
            log.seek(0)
            ends = {"codes": [codes[rank] for rank in sorted(codes)], "output": log.read()}
        print(json.dumps(ends), flush=True)


def wait_for_ranks(pids: dict[int, int], fault: str | None) -> dict[int, int]:
    """Exit codes by rank. As srun --kill-on-bad-exit and torchrun do: a rank that fails takes the others with it."""
    codes: dict[int, int] = {}
    # Those that can end by themselves, and clean up, get all the time that a busy machine may need.
    grace_seconds = 2 if fault in HANGING else 120
    deadline = None
    while len(codes) < len(pids):
        for pid, rank in pids.items():
            if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        if any(code not in (0, 75, 130) for code in codes.values()):
            deadline = deadline or time.monotonic() + grace_seconds
        if deadline and time.monotonic() > deadline:
            for pid, rank in pids.items():
                if rank not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return codes


if __name__ == "__main__":
    main()
