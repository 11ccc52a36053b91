"""Benchmark of the quadratic relation over T: checked, then timed against plain formulas and attention."""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Lines
from benchmarks.relation import (
    ATTENTION,
    COMPILED,
    DTYPES,
    EAGER,
    EPS,
    TOLERANCES,
    Function,
    attention,
    make_inputs,
    panels,
    ratios,
    relative_errors,
)
from benchmarks.relation import measure as measure_times
from causalrn.ops import PairRule, PairTerms, exp_probe, relation_quadratic
from causalrn.ops.reference import relation_quadratic_reference
from causalrn.system import available_bytes, format_bytes

OURS = "relation_quadratic"
BATCH_SIZE = 4
LENGTHS = (64, 128, 256, 512, 1024, 2048)
# Copies of (B, T, T, H, D) in float32 that the plain formula holds at its peak in forward and backward.
PLAIN_COPIES = 8


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """Checks, then times each contender at each length; returns the record and the panels of its plot.

    Raises:
        RuntimeError: a result that is not that of the definition.
    """
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    errors = check(device, dtype, options.heads, options.channels)
    exp_rate = exp_probe.measure_exp_rate() if device.type == "cpu" else exp_rate_of_gpu(device)
    print(f"limit: {exp_rate / 1e9:.1f} Gexp/s in a bare loop")
    rows: list[dict[str, Any]] = []
    batch = options.batch_size or BATCH_SIZE
    for length in options.lengths or LENGTHS:
        for name, contender in contenders().items():
            row = measure(
                name, contender, options, (batch, length, options.heads, options.channels), exp_rate
            )
            if row is not None:
                rows.append(row)
                report(row)
        torch.compiler.reset()
    record = {
        "benchmark": "relation",
        "form": "quadratic",
        "batch_size": batch,
        **{key: getattr(options, key) for key in ("dtype", "heads", "channels")},
        "relative_errors": errors,
        "exp_per_second_limit": exp_rate,
        "rows": rows,
        "times_faster": ratios(rows, OURS),
    }
    drawn = {
        "forward [s]": "forward_seconds",
        "forward and backward [s]": "forward_backward_seconds",
        "peak memory, forward and backward [byte]": "forward_backward_peak_bytes",
    }
    return record, panels(rows, drawn)


def exp_rate_of_gpu(device: torch.device) -> float:
    # Needs Triton, which a CPU's benchmark does not.
    from benchmarks import exp_probe_gpu

    return exp_probe_gpu.measure_exp_rate(device)


def contenders() -> dict[str, Function]:
    def ours(q: Tensor, k: Tensor) -> Tensor:
        return relation_quadratic(q, k, PairTerms(), PairRule(EPS))

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return relation_quadratic_reference(q, k, PairTerms(), PairRule(EPS))

    return {OURS: ours, EAGER: plain, COMPILED: torch.compile(plain, dynamic=False), ATTENTION: attention}


def check(device: torch.device, dtype: torch.dtype, heads: int, channels: int) -> dict[str, float]:
    """Largest errors against the definition in float64, in units of the largest element.

    Raises:
        RuntimeError: an error of more than a few roundings of the dtype.
    """
    # No multiple of any block, and small enough for the definition in float64.
    q, k, grad = make_inputs(device, dtype, (2, 67, heads, channels))
    out = relation_quadratic(q, k, PairTerms(), PairRule(EPS))
    names = ("out", "dq", "dk")
    found = (out, *torch.autograd.grad(out, (q, k), grad))
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    exact_out = relation_quadratic_reference(wide[0], wide[1], PairTerms(), PairRule(EPS))
    exact = (exact_out, *torch.autograd.grad(exact_out, wide, grad.double()))
    return relative_errors(
        dict(zip(names, found, strict=True)), dict(zip(names, exact, strict=True)), TOLERANCES[dtype]
    )


def measure(
    name: str,
    function: Function,
    options: argparse.Namespace,
    shape: tuple[int, int, int, int],
    exp_rate: float,
) -> dict[str, Any] | None:
    """Times, peak memory and rates of one contender on one shape; None where it does not fit into memory."""
    if name in (EAGER, COMPILED) and not plain_fits(torch.device(options.device), shape):
        return None
    row = measure_times(name, function, options, shape)
    if name == OURS:
        batch, length, heads, channels = shape
        exps = batch * heads * channels * length * (length + 1) // 2
        # One exponential per pair and channel in each direction.
        for direction, count in (("forward", exps), ("forward_backward", 2 * exps)):
            rate = count / row[f"{direction}_seconds"]
            row |= {f"{direction}_exp_per_second": rate, f"{direction}_share_of_exp_limit": rate / exp_rate}
    return row


def plain_fits(device: torch.device, shape: tuple[int, int, int, int]) -> bool:
    batch, length, heads, channels = shape
    needed_bytes = 4 * PLAIN_COPIES * batch * heads * channels * length**2
    free_bytes = available_bytes(device)
    if free_bytes is None or needed_bytes < free_bytes:
        return True
    print(
        f"T {length}: the plain formula needs {format_bytes(needed_bytes)}, {format_bytes(free_bytes)} are free"
    )
    return False


def report(row: dict[str, Any]) -> None:
    peak = row["forward_backward_peak_bytes"]
    line = (
        f"T {row['length']:<6} {row['contender']:<29} forward {1e3 * row['forward_seconds']:9.2f} ms, "
        f"with backward {1e3 * row['forward_backward_seconds']:9.2f} ms, "
        f"peak {'unknown' if peak is None else format_bytes(peak)}"
    )
    if "forward_exp_per_second" in row:
        rate, share = row["forward_exp_per_second"], row["forward_share_of_exp_limit"]
        line += f", {rate / 1e9:.1f} Gexp/s = {100 * share:.0f} % of the limit"
    print(line, flush=True)
