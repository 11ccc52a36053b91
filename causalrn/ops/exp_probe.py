"""Measures how many exponentials a device evaluates per second when it does nothing else."""

import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from causalrn.ops import native

# Inputs of the bare loop on a CPU: 8 kB, a quarter of the smallest L1.
CPU_INPUTS = 2048
CPU_REPEATS = 2000


class Arguments(ctypes.Structure):
    """`ExpArguments` of csrc/exp_probe.cpp."""

    _fields_ = native.fields(pointers="x out", int64="count repeats", int32="bounded")


def measure_exp_rate(device: torch.device, *, measurements: int = 9) -> float:
    """Median exponentials per second of a bare loop on all threads (or SMs), over operands that stay close by.

    On a CPU the loop sums the kernels' own vectorised exponential over data in L1; without compiled kernels it is
    `torch.exp`. On a GPU it sums exp2, one instruction of the special-function unit.
    """
    if device.type == "cuda":
        from causalrn.ops.exp_probe_gpu import make_bare_loop

        loop, count = make_bare_loop(device)
    else:
        loop, count = cpu_loop()
    loop()
    return count / statistics.median(seconds(loop, device) for _ in range(measurements))


def cpu_loop() -> tuple[Callable[[], object], int]:
    """A call and the number of exponentials it evaluates."""
    threads = torch.get_num_threads()
    if native.load_library() is None:
        x = torch.randn(threads * CPU_INPUTS)
        out = torch.empty_like(x)
        return lambda: [torch.exp(x, out=out) for _ in range(CPU_REPEATS)], CPU_REPEATS * x.numel()
    tensors = {"x": torch.randn(CPU_INPUTS), "out": torch.empty(1)}
    numbers = {"count": CPU_INPUTS, "repeats": CPU_REPEATS, "bounded": True, "threads": threads}
    return lambda: native.call(
        "exp_bare_loop", Arguments, tensors, **numbers
    ), CPU_REPEATS * CPU_INPUTS * threads


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
