"""Checks the formulas of benchmarks.memory_model against the peak memory of real training runs at small sizes."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from benchmarks.common import Lines, status_bytes
from benchmarks.memory_model import Shape, activation_bytes, state_bytes
from causalrn.training.allocator import return_freed_memory
from causalrn.training.config_files import shipped_configs

# Where the package lies, so that the runs import it as this process does.
ROOT = Path(__file__).parents[1]
MIXERS = {"quadratic": "QuadraticRelation", "linear": "LinearRelation"}
OVERLAYS = {"one": "cpu", "ddp": "ddp", "fsdp": "fsdp"} | {
    name: f"deepspeed_{name}" for name in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
}


class PeakMemory(L.Callback):
    """Writes the most memory that training held, parameters included, into PATH.RANK.

    Args:
        path: start of the files' names.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        return_freed_memory()
        # Resident memory now is the program and, once, the parameters.
        size = sum(parameter.nbytes for parameter in pl_module.parameters())
        self.program_bytes = status_bytes("VmRSS") - size

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # From the second step on: the optimizer's state is there, and what was needed to start is not.
        if trainer.global_step == 1 and batch_idx % trainer.accumulate_grad_batches == 0:
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)
            else:
                # 5 resets the peak (proc(5), clear_refs).
                Path("/proc/self/clear_refs").write_text("5")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Read before a checkpoint is written.
        if trainer.global_step < 2:
            return
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(pl_module.device)
        else:
            peak = status_bytes("VmHWM") - self.program_bytes
        Path(f"{self.path}.{trainer.global_rank}").write_text(str(peak))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    default = ["one", "ddp", "fsdp"]
    parser.add_argument(
        "--strategies", nargs="+", choices=tuple(OVERLAYS), default=default, help="overlays to run"
    )
    parser.add_argument("--forms", nargs="+", choices=tuple(MIXERS), default=list(MIXERS), help="relations")
    parser.add_argument("--d-model", type=int, default=512, help="C; D is 4 C (default: 512)")
    parser.add_argument("--layers", type=int, default=6, help="(default: 6)")
    parser.add_argument("--context", type=int, default=128, help="tokens per string (default: 128)")
    parser.add_argument("--batch-size", type=int, default=8, help="strings over all ranks (default: 8)")
    parser.add_argument(
        "--ranks", type=int, default=2, help="processes of all strategies but one (default: 2)"
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """Prints a line per run; the record holds measured and predicted bytes per device, and their ratio."""
    shape = Shape(
        options.d_model, 4 * options.d_model, options.layers, vocab_size=256, context=options.context
    )
    rows = []
    for strategy in options.strategies:
        # The forms differ in activations, which the strategies do not change.
        for form in options.forms if strategy == "one" else options.forms[:1]:
            ranks = 1 if strategy == "one" else options.ranks
            flags = ["--config", str(shipped_configs() / f"trainer/{OVERLAYS[strategy]}.yaml")]
            flags += ["--trainer.devices", str(ranks)]
            # What a run of next to no model holds is the libraries that training loads.
            tiny = Shape(8, 32, 1, vocab_size=32, context=16)
            measured = measure(shape, form, options.batch_size, flags)
            measured -= measure(tiny, form, options.batch_size, flags)
            rows.append(compare(shape, form, strategy, ranks, options.batch_size, measured))
            print(describe(rows[-1]), flush=True)
    record = {"benchmark": "memory", "parameters": shape.parameters, "context": shape.context, "rows": rows}
    return record, {}


def describe(row: dict[str, Any]) -> str:
    sizes = "  ".join(f"{name} {row[f'{name}_bytes'] / 1e6:8.1f} MB" for name in ("measured", "predicted"))
    return f"{row['strategy']:<14} {row['form']:<10} {sizes}  ratio {row['measured_over_predicted']:.2f}"


def compare(
    shape: Shape, form: str, strategy: str, ranks: int, batch_size: int, measured: int
) -> dict[str, Any]:
    state = state_bytes(shape, strategy, ranks, mixed=False)
    # On a CPU the host's memory is the device's.
    host = state.host if not torch.cuda.is_available() else 0
    activations = activation_bytes(shape, batch_size // ranks * shape.context, mixed=False)
    predicted = state.device + host + activations
    return {
        "strategy": strategy,
        "form": form,
        "ranks": ranks,
        "measured_bytes": measured,
        "predicted_bytes": round(predicted),
        "predicted_activation_bytes": round(activations),
        "measured_over_predicted": measured / predicted,
    }


def measure(shape: Shape, form: str, batch_size: int, flags: Sequence[str]) -> int:
    """Most bytes that a rank of a run with two accumulated batches per step held.

    Raises:
        RuntimeError: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.yaml")
        config.write_text(yaml.safe_dump(make_config(shape, form, batch_size, f"{folder}/peak")))
        command = [sys.executable, "-m", "causalrn.fit", "--config", str(config), *flags]
        done = subprocess.run(
            [*command, "--run_dir", f"{folder}/run"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return max(int(path.read_text()) for path in Path(folder).glob("peak.*"))


def make_config(shape: Shape, form: str, batch_size: int, path: str) -> dict[str, Any]:
    mixer = {
        "class_path": f"causalrn.models.{MIXERS[form]}",
        "init_args": {"d_model": shape.d_model, "d_hidden": shape.d_hidden},
    }
    network = {
        "class_path": "causalrn.models.LanguageModel",
        "init_args": {
            "vocab_size": shape.vocab_size,
            "n_layers": shape.n_layers,
            "max_length": shape.context,
            "mixer": mixer,
        },
    }
    return {
        "trainer": {
            "max_steps": 2,
            # Gradients stay while the next batch's activations are there: the most that a step can need.
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "gradient_clip_val": 1.0,
            "callbacks": [{"class_path": "benchmarks.memory.PeakMemory", "init_args": {"path": path}}],
        },
        "model": {"class_path": "causalrn.training.LanguageModelModule", "init_args": {"network": network}},
        "data": {
            "class_path": "datamodules.tasks.copying.CopyDataModule",
            "init_args": {
                "length": (shape.context - 2) // 2,
                "batch_size": batch_size,
                "vocab_size": shape.vocab_size,
            },
        },
    }
