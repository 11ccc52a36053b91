"""Measures how many bytes per second a device reads from its memory when it does nothing else."""

import ctypes
import statistics
import time

import torch

from causalrn.ops import native

# Far above the last-level cache.
PROBE_BYTES = 2**29


def measure_read_bandwidth(device: torch.device, *, measurements: int = 9) -> float:
    """Median bytes per second of reading a large array once, on all threads.

    On a CPU by a loop of loads and sums; without compiled kernels, and on a GPU, by `torch.sum`.
    """
    x = torch.ones(PROBE_BYTES // 4, device=device)
    threads = torch.get_num_threads()
    kernel = native.find_kernel("read_floats") if device.type == "cpu" else None
    arguments = (ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), ctypes.c_int(threads))
    times = []
    for _ in range(1 + measurements):
        start = time.perf_counter()
        if kernel is None:
            x.sum()
        else:
            kernel(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return x.nbytes / statistics.median(times[1:])
