"""The command `python -m benchmarks`: times the operators and the training step, and files the results."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import data as bench_data
from benchmarks import decode as bench_decode
from benchmarks import extrapolation as bench_extrapolation
from benchmarks import linear as bench_linear
from benchmarks import memory as bench_memory
from benchmarks import metrics as bench_metrics
from benchmarks import overhead as bench_overhead
from benchmarks import quadratic as bench_quadratic
from benchmarks import relation as bench_relation
from benchmarks import step as bench_step
from benchmarks.common import Lines, describe_machine, file_record, plot_panels
from benchmarks.targets import print_targets
from causalrn.system import check_options
from causalrn.training.allocator import keep_freed_memory
from causalrn.training.errors import run_command

FORMS = {"quadratic": bench_quadratic, "linear": bench_linear}


class Benchmark(NamedTuple):
    """One of the benchmarks: its record and the panels of its plot (none: no plot) come from the parsed options."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], dict[str, Lines]]]
    # Name of the filed record and title of its plot, filled in from the options.
    name: str
    title: str = ""
    # Label and scale of the plot's x axis.
    x_axis: tuple[str, str] = ("T [tokens]", "log")


def add_relation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--form", choices=tuple(FORMS), required=True, help="which relation")
    bench_relation.add_arguments(parser)


def run_relation(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    return FORMS[options.form].run(options)


BENCHMARKS = {
    "relation": Benchmark(
        "an operator over T, against plain formulas and attention",
        add_relation_arguments,
        run_relation,
        "relation_{form}_{device}_{dtype}_D{channels}",
        "relation, {form}, {dtype}, H {heads}, D {channels}",
    ),
    "decode": Benchmark(
        "tokens per second, against the memory's speed and a Transformer",
        bench_decode.add_arguments,
        bench_decode.run,
        "decode_C{d_model}_D{d_hidden}",
        "decode, float32, C {d_model}, D {d_hidden}, {layers} layers",
    ),
    "step": Benchmark(
        "a training step of the official copying model",
        bench_step.add_arguments,
        bench_step.run,
        "step_{form}",
    ),
    "data": Benchmark(
        "preparing shards, the first batch, and tokens per second",
        bench_data.add_arguments,
        bench_data.run,
        "data",
    ),
    "metrics": Benchmark(
        "what the training-time metrics take of a step",
        bench_metrics.add_arguments,
        bench_metrics.run,
        "metrics_{config.stem}",
    ),
    "extrapolation": Benchmark(
        "copying beyond the training length, by checkpoints of one recipe",
        bench_extrapolation.add_arguments,
        bench_extrapolation.run,
        "extrapolation_{name}",
        "copying beyond the training length",
        ("letters per string", "linear"),
    ),
    "memory": Benchmark(
        "peak memory of training runs, against the formulas",
        bench_memory.add_arguments,
        bench_memory.run,
        "memory_{device}",
    ),
    "overhead": Benchmark(
        "what the framework adds to a step of a bare loop",
        bench_overhead.add_arguments,
        bench_overhead.run,
        "overhead",
    ),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs a benchmark and prints its record as one JSON line last.

    Raises:
        ValueError: a number that nothing can be timed at.
    """
    options = parse(arguments)
    for name in (name for name, value in vars(options).items() if is_count(value)):
        # Without worker processes the loader reads by itself.
        check_options(options, "[0, inf)" if name == "workers" else "(0, inf)", name)
    if options.threads:
        torch.set_num_threads(options.threads)
    benchmark = BENCHMARKS[options.benchmark]
    record, panels = benchmark.run(options)
    device = torch.device(options.device)
    record |= {"machine": describe_machine(device)}
    print_targets(record.get("targets", {}))
    if options.output is not None:
        settings = {**vars(options), "device": device.type}
        path = file_record(options.output, benchmark.name.format_map(settings), record)
        print(f"filed as {path}")
        if panels:
            machine = record["machine"]
            title = f"{benchmark.title.format_map(settings)}, {machine.get('gpu', machine['cpu'])}"
            label, scale = benchmark.x_axis
            plot_panels(path.with_suffix(".png"), title, label, panels, scale)
    print(json.dumps(record))


def is_count(value: Any) -> bool:
    """Whether an option is a number, or several: how many, how long or how large."""
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parsers = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        # Those without an option for it run on a CPU.
        subparser = parsers.add_parser(name, help=benchmark.help)
        subparser.set_defaults(device="cpu")
        benchmark.add_arguments(subparser)
        subparser.add_argument("--threads", type=int, help="CPU threads (default: as torch)")
        subparser.add_argument("--output", type=Path, help="folder for the JSON record and its plot")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # As causalrn.fit does, for every contender alike.
    keep_freed_memory()
    run_command(main)
