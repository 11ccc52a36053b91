"""Logs how fast a run trains, how well it uses the device, what it waits for, and how long it will still take."""

import math
import resource
import sys
import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler

from causalrn.models import LanguageModel
from causalrn.models.cost import Cost, training_cost
from causalrn.system import check_range
from causalrn.training.callbacks.log_steps import is_log_step, write_metrics
from causalrn.training.peaks import peak_exps, peak_flops


class Throughput(L.Callback):
    """Logs speed, utilisation, data waiting, peak memory and time left with the Trainer's other metrics.

    Rates are means over the steps since the last logged one and over all ranks, measured with the host's clock. The
    device is waited for at logged steps only, so a mean between two of them is exact. Validation time is excluded.

    Logged under `train/`: step_seconds, tokens_per_second, samples_per_second, data_share (time waiting for batches),
    peak_memory_bytes (the process's on a CPU), flops_per_second and exps_per_second (by formula, see
    `causalrn.models.cost`; a warning names what has none), their shares of the devices' peaks flops_utilisation and
    exps_utilisation, and seconds_left (validation included).

    Args:
        peak_flops: dense matrix FLOP/s of one device; by default that of `causalrn.training.peaks` for the GPU's name.
        peak_exps: exponentials per second of one device; by default as above, on a CPU measured.
    """

    def __init__(self, peak_flops: float | None = None, peak_exps: float | None = None) -> None:
        check_range(self, "(0, inf)", peak_flops=peak_flops, peak_exps=peak_exps)
        self.peak_flops = peak_flops
        self.peak_exps = peak_exps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = pl_module.device
        network = getattr(pl_module, "network", None)
        problem = why_without_cost(network)
        if problem and trainer.is_global_zero:
            warnings.warn(f"metrics of FLOPs and exponentials are left out: {problem}", stacklevel=2)
        self.network = None if problem else network
        self.flops_peak = self.peak_flops or peak_flops(device, str(trainer.precision))
        self.exps_peak = self.peak_exps or peak_exps(device)
        self.costs: dict[int, Cost] = {}
        self.waiting = WaitingClock(trainer.profiler)  # pyright: ignore[reportAttributeAccessIssue]
        trainer.profiler = self.waiting  # pyright: ignore[reportAttributeAccessIssue]
        self.run_seconds = time.perf_counter()
        self.run_step = trainer.global_step
        self.start(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop_watching(trainer)

    def on_exception(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self.stop_watching(trainer)

    def stop_watching(self, trainer: L.Trainer) -> None:
        # An exception may come before training begins.
        if isinstance(profiler := trainer.profiler, WaitingClock):  # pyright: ignore[reportAttributeAccessIssue]
            trainer.profiler = profiler.inner  # pyright: ignore[reportAttributeAccessIssue]

    def start(self, trainer: L.Trainer) -> None:
        self.since_seconds = time.perf_counter()
        self.since_step = trainer.global_step
        self.waiting.seconds = 0.0
        self.tokens = self.samples = self.flops = self.exps = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_seconds = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.since_seconds += time.perf_counter() - self.validation_seconds

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rows, length = batch["tokens"].shape
        # Ranks that share a sequence are one replica.
        rows *= (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        self.samples += rows
        self.tokens += rows * length
        if self.network is not None:
            if length not in self.costs:
                self.costs[length] = training_cost(self.network, length)
            self.flops += rows * self.costs[length].flops
            self.exps += rows * self.costs[length].exps
        if trainer.global_step > self.since_step and is_log_step(trainer, trainer.global_step):
            self.report(trainer, pl_module)
            self.start(trainer)

    def report(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.perf_counter()
        seconds = now - self.since_seconds
        values = {
            "step_seconds": seconds / (trainer.global_step - self.since_step),
            "tokens_per_second": self.tokens / seconds,
            "samples_per_second": self.samples / seconds,
        }
        for name, count, peak in (
            ("flops", self.flops, self.flops_peak),
            ("exps", self.exps, self.exps_peak),
        ):
            if count:
                values[f"{name}_per_second"] = count / seconds
                if peak is not None:
                    values[f"{name}_utilisation"] = count / seconds / (peak * trainer.world_size)
        total = trainer.estimated_stepping_batches
        if math.isfinite(total):
            rate = (now - self.run_seconds) / (trainer.global_step - self.run_step)
            values["seconds_left"] = max(0.0, total - trainer.global_step) * rate
        # The rank that waits, or fills its memory, is the one that matters.
        worst = torch.tensor(
            [self.waiting.seconds / seconds, peak_memory_bytes(pl_module.device)], device=pl_module.device
        )
        worst = trainer.strategy.reduce(worst, reduce_op="max")
        assert isinstance(worst, torch.Tensor)
        values["data_share"], values["peak_memory_bytes"] = worst.tolist()
        write_metrics(trainer, {f"train/{name}": value for name, value in values.items()})


def why_without_cost(network: object) -> str:
    """Why no formula tells what the network costs; nothing where one does."""
    if not isinstance(network, LanguageModel):
        return f"the cost of {type(network).__name__} is not known; want a LanguageModel"
    try:
        training_cost(network, 1)
    except TypeError as error:
        return str(error)
    return ""


class WaitingClock(Profiler):
    """Adds up the seconds that the training loop waits for batches, as Lightning tells its profilers.

    Args:
        inner: the Trainer's own profiler, which goes on hearing of everything.
    """

    ACTION = "train_dataloader_next"

    def __init__(self, inner: Profiler) -> None:
        super().__init__(inner.dirpath, inner.filename)
        self.inner = inner
        self.seconds = 0.0
        self.began = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(self.ACTION):
            self.began = time.perf_counter()
        self.inner.start(action_name)

    def stop(self, action_name: str) -> None:
        self.inner.stop(action_name)
        if action_name.endswith(self.ACTION):
            self.seconds += time.perf_counter() - self.began


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that tensors held on a GPU since the process started; on a CPU, that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage(2) counts bytes on macOS, and kB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
