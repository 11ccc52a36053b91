"""The command `python -m causalrn.bench`: times the operators and the training step, and files the results."""

import argparse
import json
from pathlib import Path

import torch

from causalrn import (
    bench_data,
    bench_decode,
    bench_extrapolation,
    bench_linear,
    bench_memory,
    bench_metrics,
    bench_overhead,
    bench_quadratic,
    bench_relation,
    bench_step,
)
from causalrn.allocator import keep_freed_memory
from causalrn.bench_targets import data_targets, decode_targets, print_targets
from causalrn.benchmarking import describe_machine, file_record, plot_panels

FORMS = {"quadratic": bench_quadratic, "linear": bench_linear}


def main(arguments: list[str] | None = None) -> None:
    """Runs a benchmark and prints its record as one JSON line last."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.benchmark == "relation":
        record, panels = FORMS[options.form].run(options)
        device = torch.device(options.device)
        name = f"relation_{options.form}_{device.type}_{options.dtype}_D{options.channels}"
        shape = f"H {options.heads}, D {options.channels}"
        title = f"relation, {options.form}, {options.dtype}, {shape}"
    elif options.benchmark == "decode":
        record, panels = bench_decode.run(options)
        record["targets"] = decode_targets(record)
        device = torch.device("cpu")
        name = f"decode_C{options.d_model}_D{options.d_hidden}"
        title = f"decode, float32, C {options.d_model}, D {options.d_hidden}, {options.layers} layers"
    elif options.benchmark == "extrapolation":
        record, panels = bench_extrapolation.run(options)
        device = torch.device("cpu")
        name = f"extrapolation_{options.name}"
        title = "copying beyond the training length"
    elif options.benchmark == "data":
        record, panels = bench_data.run(options), {}
        record["targets"] = data_targets(record)
        device = torch.device("cpu")
        name = title = "data"
    elif options.benchmark == "metrics":
        record, panels = bench_metrics.run(options), {}
        device = torch.device("cpu")
        name = title = f"metrics_{options.config.stem}"
    elif options.benchmark == "memory":
        record, panels = bench_memory.run(options), {}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = title = f"memory_{device.type}"
    elif options.benchmark == "overhead":
        record, panels = bench_overhead.run(options), {}
        device = torch.device("cpu")
        name = title = "overhead"
    else:
        record, panels = bench_step.run(options), {}
        device = torch.device("cpu")
        name = title = f"step_{options.form}"
    record |= {"machine": describe_machine(device)}
    print_targets(record.get("targets", {}))
    if options.output is not None:
        path = file_record(options.output, name, record)
        print(f"filed as {path}")
        if panels:
            machine = record["machine"]
            title = f"{title}, {machine.get('gpu', machine['cpu'])}"
            shares = options.benchmark == "extrapolation"
            axis = ("letters per string", "linear") if shares else ("T [tokens]", "log")
            plot_panels(path.with_suffix(".png"), title, axis[0], panels, axis[1])
    print(json.dumps(record))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m causalrn.bench", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    relation = benchmarks.add_parser(
        "relation", help="an operator over T, against plain formulas and attention"
    )
    relation.add_argument("--form", choices=tuple(FORMS), required=True, help="which relation")
    bench_relation.add_arguments(relation)
    decode = benchmarks.add_parser(
        "decode", help="tokens per second, against the memory's speed and a Transformer"
    )
    bench_decode.add_arguments(decode)
    step = benchmarks.add_parser("step", help="a training step of the official copying model")
    bench_step.add_arguments(step)
    data = benchmarks.add_parser("data", help="preparing shards, the first batch, and tokens per second")
    bench_data.add_arguments(data)
    metrics = benchmarks.add_parser("metrics", help="what the training-time metrics take of a step")
    bench_metrics.add_arguments(metrics)
    extrapolation = benchmarks.add_parser(
        "extrapolation", help="copying beyond the training length, by checkpoints of one recipe"
    )
    bench_extrapolation.add_arguments(extrapolation)
    memory = benchmarks.add_parser("memory", help="peak memory of training runs, against the formulas")
    bench_memory.add_arguments(memory)
    overhead = benchmarks.add_parser("overhead", help="what the framework adds to a step of a bare loop")
    bench_overhead.add_arguments(overhead)
    for benchmark in (relation, decode, step, data, metrics, extrapolation, memory, overhead):
        benchmark.add_argument("--threads", type=int, help="CPU threads (default: as torch)")
        benchmark.add_argument("--output", type=Path, help="folder for the JSON record and its plot")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # As causalrn.fit does, for every contender alike.
    keep_freed_memory()
    main()
