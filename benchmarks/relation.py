"""Helpers of the benchmarks of both relations: arguments, contenders, inputs, rows of results."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Lines, median_seconds, peak_bytes

EAGER = "plain formula, eager"
COMPILED = "plain formula, compiled"
ATTENTION = "scaled_dot_product_attention"
EPS = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative errors that a few roundings of the dtype explain.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Function = Callable[[Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every form; the defaults that depend on it are None here."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of q and k (default: float32)"
    )
    parser.add_argument(
        "--batch-size", type=int, help="sequences B (default: 4; linear: as many as fill 131072 tokens)"
    )
    parser.add_argument("--heads", type=int, default=1, help="heads H (default: 1)")
    parser.add_argument("--channels", type=int, default=192, help="channels of a head D (default: 192)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        help="sequence lengths T (default: 64 to 2048; linear: 256 to 1000000)",
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed calls per figure (default: 20)")
    parser.add_argument(
        "--budget-seconds", type=float, default=5.0, help="seconds after which 3 calls suffice (default: 5)"
    )


def attention(q: Tensor, k: Tensor) -> Tensor:
    """Causal attention of the same shape, with the keys for values."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k, is_causal=True).transpose(1, 2)


def make_inputs(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, which require gradients, and the gradient of the output, all (B, T, H, D)."""
    generator = torch.Generator().manual_seed(0)
    q, k, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    return q.requires_grad_(), k.requires_grad_(), grad


def relative_errors(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> dict[str, float]:
    """Largest errors, in units of the largest element.

    Raises:
        RuntimeError: an error above the tolerance, or NaN.
    """
    errors = {}
    for name, wanted in exact.items():
        errors[name] = ((found[name].double() - wanted).abs().max() / wanted.abs().max()).item()
        # `not <=` also catches NaN.
        if not errors[name] <= tolerance:
            raise RuntimeError(
                f"{name}: got a relative error of {errors[name]:.1e}, wanted at most {tolerance:.0e}"
            )
    print("checked against float64: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()))
    return errors


def measure(
    name: str, function: Function, options: argparse.Namespace, shape: tuple[int, int, int, int]
) -> dict[str, Any]:
    """Times and peak memory of one contender on q and k of one shape (B, T, H, D)."""
    device = torch.device(options.device)
    q, k, grad = make_inputs(device, DTYPES[options.dtype], shape)

    def forward() -> None:
        with torch.no_grad():
            function(q, k)

    def forward_backward() -> None:
        torch.autograd.grad(function(q, k), (q, k), grad)

    timing = {"repeats": options.repeats, "budget_seconds": options.budget_seconds}
    return {
        "contender": name,
        "length": shape[1],
        "forward_seconds": median_seconds(forward, device, **timing),
        "forward_backward_seconds": median_seconds(forward_backward, device, **timing),
        "forward_peak_bytes": peak_bytes(forward, device),
        "forward_backward_peak_bytes": peak_bytes(forward_backward, device),
    }


def ratios(rows: Sequence[dict[str, Any]], ours: str) -> dict[str, dict[int, dict[str, float]]]:
    """How many times faster ours is: by contender, by length, by direction."""
    own = {row["length"]: row for row in rows if row["contender"] == ours}
    others = [row for row in rows if row["contender"] != ours]
    faster: dict[str, dict[int, dict[str, float]]] = {row["contender"]: {} for row in others}
    for row in others:
        length = row["length"]
        faster[row["contender"]][length] = {
            direction: row[f"{direction}_seconds"] / own[length][f"{direction}_seconds"]
            for direction in ("forward", "forward_backward")
        }
    return faster


def panels(rows: Sequence[dict[str, Any]], keys: dict[str, str]) -> dict[str, Lines]:
    """A panel per y label, given the key of its figures in the rows, with a line over T per contender."""
    drawn: dict[str, Lines] = {}
    for label, key in keys.items():
        drawn[label] = {}
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [(row["length"], row[key]) for row in rows if row["contender"] == name and row.get(key)]
            drawn[label][name] = ([x for x, _ in points], [y for _, y in points])
    return drawn
