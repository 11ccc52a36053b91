"""Benchmark of the quadratic relation over T: checked, then timed against plain formulas and attention."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from causalrn.benchmarking import Lines, median_seconds, peak_bytes
from causalrn.memory import available_bytes, format_bytes
from causalrn.ops import relation_quadratic
from causalrn.ops.exp_probe import measure_exp_rate
from causalrn.ops.reference import relation_quadratic_reference

OURS = "relation_quadratic"
EAGER = "plain formula, eager"
COMPILED = "plain formula, compiled"
ATTENTION = "scaled_dot_product_attention"
EPS = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Copies of (B, T, T, H, D) in float32 that the plain formula holds at its peak in forward and backward.
PLAIN_COPIES = 8

Function = Callable[[Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of q and k (default: float32)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="sequences B (default: 4)")
    parser.add_argument("--heads", type=int, default=1, help="heads H (default: 1)")
    parser.add_argument("--channels", type=int, default=192, help="channels of a head D (default: 192)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512, 1024, 2048],
        help="sequence lengths T (default: 64 to 2048)",
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed calls per figure (default: 20)")
    parser.add_argument(
        "--budget-seconds", type=float, default=5.0, help="seconds after which 3 calls suffice (default: 5)"
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """Checks, then times each contender at each length; returns the record and the panels of its plot.

    Raises:
        RuntimeError: a result that is not that of the definition.
    """
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    errors = check(device, dtype, options.heads, options.channels)
    print("checked against float64: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()))
    exp_rate = measure_exp_rate(device)
    print(f"limit: {exp_rate / 1e9:.1f} Gexp/s in a bare loop")
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for name, contender in contenders().items():
            row = measure(name, contender, options, length, exp_rate)
            if row is not None:
                rows.append(row)
                report(row)
        torch.compiler.reset()
    record = {
        "benchmark": "relation",
        "form": "quadratic",
        **{key: getattr(options, key) for key in ("dtype", "batch_size", "heads", "channels")},
        "relative_errors": errors,
        "exp_per_second_limit": exp_rate,
        "rows": rows,
        "times_faster": ratios(rows),
    }
    return record, panels(rows)


def contenders() -> dict[str, Function]:
    def ours(q: Tensor, k: Tensor) -> Tensor:
        return relation_quadratic(q, k, eps=EPS)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return relation_quadratic_reference(q, k, eps=EPS)

    def attention(q: Tensor, k: Tensor) -> Tensor:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2)

    return {OURS: ours, EAGER: plain, COMPILED: torch.compile(plain, dynamic=False), ATTENTION: attention}


def make_inputs(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, which require gradients, and the gradient of the output, all (B, T, H, D)."""
    generator = torch.Generator().manual_seed(0)
    q, k, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return q.requires_grad_(), k.requires_grad_(), grad


def check(device: torch.device, dtype: torch.dtype, heads: int, channels: int) -> dict[str, float]:
    """Largest errors against the definition in float64, in units of the largest element.

    Raises:
        RuntimeError: an error of more than a few roundings of the dtype.
    """
    # No multiple of any block, and small enough for the definition in float64.
    q, k, grad = make_inputs(device, dtype, (2, 67, heads, channels))
    out = relation_quadratic(q, k, eps=EPS)
    found = (out, *torch.autograd.grad(out, (q, k), grad))
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    exact_out = relation_quadratic_reference(wide[0], wide[1], eps=EPS)
    exact = (exact_out, *torch.autograd.grad(exact_out, wide, grad.double()))
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    errors = {}
    for name, actual, wanted in zip(("out", "dq", "dk"), found, exact, strict=True):
        errors[name] = ((actual.double() - wanted).abs().max() / wanted.abs().max()).item()
        # `not <=` also catches NaN.
        if not errors[name] <= tolerance:
            raise RuntimeError(
                f"{name}: got a relative error of {errors[name]:.1e}, wanted at most {tolerance:.0e}"
            )
    return errors


def measure(
    name: str, function: Function, options: argparse.Namespace, length: int, exp_rate: float
) -> dict[str, Any] | None:
    """Times, peak memory and rates of one contender at one length; None where it does not fit into memory."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    shape = (options.batch_size, length, options.heads, options.channels)
    if name in (EAGER, COMPILED) and not plain_fits(device, shape):
        return None
    q, k, grad = make_inputs(device, dtype, shape)

    def forward() -> None:
        with torch.no_grad():
            function(q, k)

    def forward_backward() -> None:
        torch.autograd.grad(function(q, k), (q, k), grad)

    timing = {"repeats": options.repeats, "budget_seconds": options.budget_seconds}
    row: dict[str, Any] = {
        "contender": name,
        "length": length,
        "forward_seconds": median_seconds(forward, device, **timing),
        "forward_backward_seconds": median_seconds(forward_backward, device, **timing),
        "forward_peak_bytes": peak_bytes(forward, device),
        "forward_backward_peak_bytes": peak_bytes(forward_backward, device),
    }
    if name == OURS:
        exps = options.batch_size * options.heads * options.channels * length * (length + 1) // 2
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


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """How many times faster ours is: by contender, by length, by direction."""
    ours = {row["length"]: row for row in rows if row["contender"] == OURS}
    others = [row for row in rows if row["contender"] != OURS]
    faster: dict[str, dict[int, dict[str, float]]] = {row["contender"]: {} for row in others}
    for row in others:
        length = row["length"]
        faster[row["contender"]][length] = {
            direction: row[f"{direction}_seconds"] / ours[length][f"{direction}_seconds"]
            for direction in ("forward", "forward_backward")
        }
    return faster


def panels(rows: list[dict[str, Any]]) -> dict[str, Lines]:
    """Time and peak memory over T, a line per contender."""
    keys = {
        "forward [s]": "forward_seconds",
        "forward and backward [s]": "forward_backward_seconds",
        "peak memory, forward and backward [byte]": "forward_backward_peak_bytes",
    }
    drawn: dict[str, Lines] = {}
    for label, key in keys.items():
        drawn[label] = {}
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [(row["length"], row[key]) for row in rows if row["contender"] == name and row[key]]
            drawn[label][name] = ([x for x, _ in points], [y for _, y in points])
    return drawn
