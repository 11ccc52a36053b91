"""Benchmark of the linear relation over T: checked, then timed against plain formulas, attention and bare copying."""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Lines, median_seconds
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
    measure,
    panels,
    ratios,
    relative_errors,
)
from causalrn.ops import relation_linear
from causalrn.ops.reference import LinearState, normalise, relation_linear_reference
from causalrn.system import available_bytes, format_bytes

OURS = "relation_linear"
DEFINITION = "cumulative sum without logarithm, compiled"
# Every length is timed on about as many tokens, far more than a cache holds at D = 192: then the times per token differ
# by the length alone.
TOKENS = 2**17
LENGTHS = (256, 1024, 4096, 16_384, 65_536, 1_000_000)
# Copies of (B, T, H, D) in float32 that the plain formulas hold at their peak in forward and backward.
PLAIN_COPIES = 20
# A contender whose next call would take longer is left out from there on.
LONGEST_CALL_SECONDS = 15
# Far above the last-level cache.
COPY_BYTES = 2**29
# Tensors of the size of q that the operator must read or write at least once: q, k and y; then q, k, dy, dq and dk.
TENSORS = {"forward": 3, "forward_backward": 8}


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """Checks, then times each contender at each length; returns the record and the panels of its plot.

    Raises:
        RuntimeError: a result that is not that of the definition.
    """
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    errors = check(device, dtype, options.heads, options.channels)
    bandwidth = copy_bytes_per_second(device)
    print(f"limit: a copy reads and writes {bandwidth / 1e9:.1f} GB/s")
    rows: list[dict[str, Any]] = []
    for length in options.lengths or LENGTHS:
        batch = options.batch_size or max(1, TOKENS // length)
        shape = (batch, length, options.heads, options.channels)
        for name, contender in contenders().items():
            if not feasible(name, shape, rows, device):
                continue
            row = measure(name, contender, options, shape) | {"batch_size": batch}
            add_rates(row, shape, dtype.itemsize, bandwidth)
            rows.append(row)
            report(row)
        torch.compiler.reset()
    record = {
        "benchmark": "relation",
        "form": "linear",
        **{key: getattr(options, key) for key in ("dtype", "heads", "channels")},
        "relative_errors": errors,
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
        "times_faster": ratios(rows, OURS),
    }
    drawn = {
        "forward [s/token]": "forward_seconds_per_token",
        "forward and backward [s/token]": "forward_backward_seconds_per_token",
        "peak memory, forward and backward [byte/token]": "forward_backward_peak_bytes_per_token",
    }
    return record, panels(rows, drawn)


def plain_formula(q: Tensor, k: Tensor, eps: float) -> Tensor:
    """The linear relation as the official code writes it, with torch.logcumsumexp."""
    log_sums = normalise(k, "layer", eps).logcumsumexp(1)
    log_y = (normalise(q, "layer", eps) + log_sums).flatten(2)
    return normalise((log_y - log_y.amax(-1, keepdim=True)).exp(), "layer", eps).view_as(q)


def contenders() -> dict[str, Function]:
    def ours(q: Tensor, k: Tensor) -> Tensor:
        return relation_linear(q, k, eps=EPS)[0]

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return plain_formula(q, k, EPS)

    def definition(q: Tensor, k: Tensor) -> Tensor:
        return relation_linear_reference(q, k, eps=EPS)[0]

    return {
        OURS: ours,
        EAGER: plain,
        COMPILED: torch.compile(plain, dynamic=False),
        DEFINITION: torch.compile(definition, dynamic=False),
        ATTENTION: attention,
    }


def check(device: torch.device, dtype: torch.dtype, heads: int, channels: int) -> dict[str, float]:
    """Largest errors against the definition in float64: values, final state, and the gradients of all inputs.

    Raises:
        RuntimeError: an error of more than a few roundings of the dtype.
    """
    # No multiple of any block, and several of them.
    q, k, grad = make_inputs(device, dtype, (2, 333, heads, channels))
    total = torch.rand(2, heads, channels, device=device).requires_grad_()
    results = []
    for function, wide in ((relation_linear, False), (relation_linear_reference, True)):
        inputs = [x.detach().double().requires_grad_() for x in (q, k, total)] if wide else [q, k, total]
        state = LinearState(inputs[2], torch.zeros(2, device=device))
        y, after = function(inputs[0], inputs[1], state, eps=EPS)
        gradients = torch.autograd.grad((y, after.total), inputs, (grad.to(y.dtype), inputs[2].detach()))
        names = ("y", "total", "dq", "dk", "dtotal")
        results.append(dict(zip(names, (y, after.total, *gradients), strict=True)))
    return relative_errors(results[0], results[1], TOLERANCES[dtype])


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read plus bytes written per second by `Tensor.copy_` on all threads."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_seconds(lambda: target.copy_(source), device)


def feasible(
    name: str, shape: tuple[int, int, int, int], rows: list[dict[str, Any]], device: torch.device
) -> bool:
    """Whether a contender fits into memory and, by its last time, is done before long; says so if not."""
    if name == OURS:
        return True
    batch, length, heads, channels = shape
    before = [row for row in rows if row["contender"] == name]
    if before:
        growth = batch * length / (before[-1]["batch_size"] * before[-1]["length"])
        if name == ATTENTION:
            growth *= length / before[-1]["length"]
        seconds = growth * before[-1]["forward_backward_seconds"]
        if seconds > LONGEST_CALL_SECONDS:
            print(f"T {length}: {name} would take {seconds:.0f} s per call, and is left out")
            return False
    needed_bytes = 4 * PLAIN_COPIES * batch * length * heads * channels
    free_bytes = available_bytes(device)
    if name == ATTENTION or free_bytes is None or needed_bytes < free_bytes:
        return True
    print(f"T {length}: {name} needs {format_bytes(needed_bytes)}, {format_bytes(free_bytes)} are free")
    return False


def add_rates(
    row: dict[str, Any], shape: tuple[int, int, int, int], itemsize_bytes: int, bandwidth: float
) -> None:
    """Adds figures per token and, for our operator, how near it comes to copying what it must read and write."""
    batch, length, heads, channels = shape
    for direction, tensors in TENSORS.items():
        seconds, peak = row[f"{direction}_seconds"], row[f"{direction}_peak_bytes"]
        row[f"{direction}_seconds_per_token"] = seconds / (batch * length)
        row[f"{direction}_peak_bytes_per_token"] = None if peak is None else peak / (batch * length)
        if row["contender"] == OURS:
            rate = tensors * batch * length * heads * channels * itemsize_bytes / seconds
            row |= {
                f"{direction}_bytes_per_second": rate,
                f"{direction}_share_of_copy_bandwidth": rate / bandwidth,
            }


def report(row: dict[str, Any]) -> None:
    peak = row["forward_backward_peak_bytes"]
    line = (
        f"T {row['length']:<8} B {row['batch_size']:<4} {row['contender']:<42} "
        f"forward {1e9 * row['forward_seconds_per_token']:8.0f} ns/token, "
        f"with backward {1e9 * row['forward_backward_seconds_per_token']:8.0f} ns/token, "
        f"peak {'unknown' if peak is None else format_bytes(peak)}"
    )
    if "forward_bytes_per_second" in row:
        rate, share = row["forward_bytes_per_second"], row["forward_share_of_copy_bandwidth"]
        line += f", forward {rate / 1e9:.1f} GB/s = {100 * share:.0f} % of copying"
        line += f", with backward {100 * row['forward_backward_share_of_copy_bandwidth']:.0f} %"
    print(line, flush=True)
