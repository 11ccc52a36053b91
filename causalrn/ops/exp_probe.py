"""Measures how many exponentials a CPU evaluates per second when it does nothing else."""

import ctypes
import statistics
import time

import torch

from causalrn.ops import native

# Inputs of the bare loop: 8 kB, a quarter of the smallest L1.
INPUTS = 2048
REPEATS = 2000


class Arguments(ctypes.Structure):
    """`ExpArguments` of csrc/exp_probe.cpp."""

    _fields_ = native.fields(pointers="x out", int64="count repeats", int32="bounded")


def measure_exp_rate(*, measurements: int = 9) -> float:
    """Median exponentials per second of a bare loop on all threads, over operands that stay close by.

    The loop sums the kernels' own vectorised exponential over data in L1; without compiled kernels it is `torch.exp`.
    """
    loop = torch_loop if native.load_library() is None else compiled_loop
    loop()
    times = []
    for _ in range(measurements):
        start = time.perf_counter()
        count = loop()
        times.append((time.perf_counter() - start) / count)
    return 1 / statistics.median(times)


def torch_loop() -> int:
    """Evaluates exponentials, and gives their number."""
    x = torch.randn(torch.get_num_threads() * INPUTS)
    out = torch.empty_like(x)
    for _ in range(REPEATS):
        torch.exp(x, out=out)
    return REPEATS * x.numel()


def compiled_loop() -> int:
    """As `torch_loop`, by the compiled kernels."""
    threads = torch.get_num_threads()
    tensors = {"x": torch.randn(INPUTS), "out": torch.empty(1)}
    native.call(
        "exp_bare_loop", Arguments, tensors, count=INPUTS, repeats=REPEATS, bounded=True, threads=threads
    )
    return REPEATS * INPUTS * threads
