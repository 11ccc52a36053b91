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

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        ("count", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


def measure_read_bandwidth(device: torch.device, *, measurements: int = 9) -> float:
    """Median bytes per second of reading a large array once, on all threads.

    On a CPU by a loop of loads and sums; without compiled kernels, and on a GPU, by `torch.sum`.
    """
    x = torch.ones(PROBE_BYTES // 4, device=device)
    threads = torch.get_num_threads()
    kernel = native.find_kernel("read_floats", Arguments) if device.type == "cpu" else None
    out = torch.empty(1)
    arguments = Arguments(x.data_ptr(), out.data_ptr(), x.numel(), threads)
    times = []
    for _ in range(1 + measurements):
        start = time.perf_counter()
        if kernel is None:
            x.sum()
        else:
            kernel(ctypes.byref(arguments))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return x.nbytes / statistics.median(times[1:])
