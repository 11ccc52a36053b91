"""Measures how many bytes per second a device reads from its memory when it does nothing else."""

import ctypes
import statistics
import time

import torch

from causalrn.ops import native

# Far above the last-level cache.
PROBE_BYTES = 2**29


class Arguments(ctypes.Structure):
    """`ReadArguments` of csrc/read_probe.cpp."""

    _fields_ = native.fields(pointers="x out", int64="count")


def measure_read_bandwidth(device: torch.device, *, measurements: int = 9) -> float:
    """Median bytes per second of reading a large array once, on all threads.

    On a CPU by a loop of loads and sums; without compiled kernels, and on a GPU, by `torch.sum`.
    """
    x = torch.ones(PROBE_BYTES // 4, device=device)
    tensors = {"x": x, "out": torch.empty(1)}
    compiled = device.type == "cpu" and native.load_library() is not None
    times = []
    for _ in range(1 + measurements):
        start = time.perf_counter()
        if compiled:
            native.call("read_floats", Arguments, tensors, count=x.numel(), threads=torch.get_num_threads())
        else:
            x.sum()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return x.nbytes / statistics.median(times[1:])
