"""Times one training step of the official copying model inside the ordinary `causalrn.fit` loop, against plain formulas."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Lines
from benchmarks.linear import plain_formula
from causalrn.models import MLP, LanguageModel, LinearRelation, Mixer, QuadraticRelation, SoftmaxAttention
from causalrn.ops import reference
from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.training.config_files import shipped_configs
from causalrn.training.loggers import read_metrics

# The paper's copying model: width, layers, vocabulary.
WIDTH, LAYERS, VOCABULARY = 192, 12, 29
# As configs/copy/paper.yaml logs: each logged value is the mean of so many steps. The first of them warm up.
LOGGED_STEPS = 10
# Where the package lies, so that the run imports it as this process does.
ROOT = Path(__file__).parents[1]
OVERLAYS = {"quadratic": [], "linear": ["--config", str(shipped_configs() / "mixer/linear_relation.yaml")]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--form", choices=tuple(OVERLAYS), default="quadratic", help="relation to train")
    parser.add_argument("--length", type=int, default=64, help="letters per string S (default: 64)")
    parser.add_argument("--batch-size", type=int, default=16, help="strings per step (default: 16)")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each contender (default: 30)")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """Prints a line per contender and returns their median seconds per step, and the ratios to ours."""
    seconds = {}
    tokens = 2 * options.length + 2
    mixers: dict[str, Callable[[], tuple[Mixer, MLP | None]]] = {
        f"plain {options.form} relation, compiled": lambda: (plain_mixer(options.form), None),
        "Transformer, compiled": lambda: (SoftmaxAttention(WIDTH, eps=0.0), MLP(WIDTH, 4 * WIDTH, eps=0.0)),
    }
    seconds["causalrn.fit"] = time_fit(options)
    report("causalrn.fit", seconds["causalrn.fit"])
    with plain_formulas():
        for name, make in mixers.items():
            mixer, mlp = make()
            model = LanguageModel(mixer, VOCABULARY, LAYERS, tokens, mlp, eps=0.0)
            seconds[name] = time_bare_loop(model, options)
            report(name, seconds[name])
    ours = seconds["causalrn.fit"]
    record = {
        "benchmark": "step",
        "form": options.form,
        "length": options.length,
        "batch_size": options.batch_size,
        "seconds_per_step": seconds,
        "ratio_to_ours": {name: value / ours for name, value in seconds.items()},
    }
    return record, {}


def report(name: str, seconds: float) -> None:
    print(f"{name:<40} {1000 * seconds:9.1f} ms per step", flush=True)


def plain_mixer(form: str) -> Mixer:
    return (QuadraticRelation if form == "quadratic" else LinearRelation)(WIDTH, WIDTH, eps=0.0)


@contextmanager
def plain_formulas() -> Iterator[None]:
    """Within it, the networks compute with plain formulas, which torch.compile may fuse as it can."""
    relations = {
        "relation_quadratic_shifted": plain_quadratic,
        "relation_linear": plain_linear,
    }
    with ExitStack() as stack:
        for module in ("relation", "attention", "language_model"):
            definitions = {"normalise": reference.normalise, **(relations if module == "relation" else {})}
            stack.enter_context(mock.patch.multiple(f"causalrn.models.{module}", **definitions))
        yield


def plain_quadratic(q: Tensor, k: Tensor, terms: PairTerms, rule: PairRule) -> tuple[Tensor, None]:
    """The definition in place of the operator, without a shift."""
    return reference.relation_quadratic_reference(q, k, terms, rule), None


def plain_linear(q: Tensor, k: Tensor, state: None, *, eps: float, **settings: Any) -> tuple[Tensor, None]:
    """The plain formula in place of the operator, without a state."""
    return plain_formula(q, k, eps), None


def time_bare_loop(model: LanguageModel, options: argparse.Namespace) -> float:
    """Median seconds of a step of a loop without a framework, the model under torch.compile."""
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0, fused=True)
    tokens = torch.randint(VOCABULARY, (options.batch_size, 2 * options.length + 2))
    times = []
    for _ in range(3 + options.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def time_fit(options: argparse.Namespace) -> float:
    """Median seconds of a step as a run of `causalrn.fit` logs them, in a process of its own."""
    network = "model.init_args.network.init_args"
    settings = {
        "trainer.precision": "32-true",
        "trainer.max_steps": LOGGED_STEPS + options.steps,
        "trainer.log_every_n_steps": LOGGED_STEPS,
        "trainer.limit_val_batches": 0,
        f"{network}.max_length": 2 * options.length + 2,
        "data.init_args.length": options.length,
        "data.init_args.batch_size": options.batch_size,
    }
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        command = [
            sys.executable,
            "-m",
            "causalrn.fit",
            "--config",
            str(shipped_configs() / "copy/paper.yaml"),
        ]
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        subprocess.run(
            [*command, *OVERLAYS[options.form], *flags, "--run_dir", str(run_dir)],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        rows = read_metrics(run_dir / "metrics.csv")
    return statistics.median([row["train/step_seconds"] for row in rows if "train/step_seconds" in row][1:])
