"""The targets of decoding and of the data side, each beside the figure of a benchmark's record."""

from collections.abc import Iterable
from typing import Any

# Contexts from which on the linear form must be faster than a Transformer of as many parameters.
LONG_CONTEXT = 4096


def at_least(value: float | None, wanted: float) -> dict[str, Any]:
    """A target; a figure that was not taken (None) is neither met nor missed."""
    return {"value": value, "at_least": wanted, "met": None if value is None else value >= wanted}


def at_most(value: float | None, wanted: float) -> dict[str, Any]:
    return {"value": value, "at_most": wanted, "met": None if value is None else value <= wanted}


def decode_targets(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The targets of `python -m benchmarks decode` out of its record."""
    first, last = record["long"]["tokens"][0], record["long"]["tokens"][-1]
    steps = {(row["model"], row["context"]): row for row in record["steps"]}
    rates = {key: row["tokens_per_second"] for key, row in steps.items()}
    faster = {
        context: rates["linear", context] / rates["Transformer", context]
        for model, context in rates
        if model == "linear" and ("Transformer", context) in rates
    }
    shares = {
        model: lowest(row["share_of_streaming_limit"] for (name, _), row in steps.items() if name == model)
        for model in ("linear", "quadratic")
    }
    rerun = record["whole_context_per_token"]
    return {
        "long_time_ratio": at_most(last["seconds"] / first["seconds"], 1.1),
        "long_memory_ratio": at_most(last["resident_bytes"] / first["resident_bytes"], 1.1),
        "linear_share_of_streaming_limit": at_least(shares["linear"], 0.7),
        "quadratic_share_of_streaming_limit": at_least(shares["quadratic"], 0.7),
        "linear_times_faster_than_whole_context": at_least(rerun["linear"]["official_ratio"], 50),
        "quadratic_times_faster_than_whole_context": at_least(rerun["quadratic"]["official_ratio"], 50),
        "linear_times_faster_than_transformer": at_least(
            lowest(ratio for context, ratio in faster.items() if context >= LONG_CONTEXT), 1
        ),
    }


def data_targets(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The targets of `python -m benchmarks data` out of its record."""
    return {
        "million_tokens_per_second": at_least(record["tokens_per_second"] / 1e6, 50),
        "times_slower_than_memmap": at_most(record["ratio_to_memmap"], 2),
        "first_batch_seconds": at_most(record["first_batch_seconds"], 2),
        "resume_seconds": at_most(record["resume_seconds"], 2),
        "prepare_mb_per_second": at_least(record["prepare_mb_per_second"], 20),
    }


def lowest(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def print_targets(targets: dict[str, dict[str, Any]]) -> None:
    """A line per target, for people."""
    for name, target in targets.items():
        bound = next(f"{key.replace('_', ' ')} {target[key]:g}" for key in target if key.startswith("at_"))
        value = "not measured" if target["value"] is None else f"{target['value']:.3g}"
        verdict = {True: "met", False: "MISSED", None: ""}[target["met"]]
        print(f"target {name:<44} {value:>12}, {bound:<13} {verdict}".rstrip(), flush=True)
