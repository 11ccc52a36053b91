"""A GPU loop of nothing but exp2, the limit that the quadratic kernels are held against."""

import statistics
import time

import torch
import triton
import triton.language as tl

BLOCK = 1024
REPEATS = 4096
# Programs per SM: enough to fill it several times over, so that the tail does not count.
PROGRAMS_PER_SM = 64


@triton.jit
def bare_exp_kernel(x_ptr, out_ptr, repeats, block: tl.constexpr):
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + offsets)
    total = tl.zeros_like(x)
    for _ in range(repeats):
        total += tl.exp2(x)
        # Another argument each time, so that no evaluation can be left out.
        x += 1e-6
    tl.store(out_ptr + offsets, total)


def measure_exp_rate(device: torch.device, *, measurements: int = 9) -> float:
    """Median exponentials per second of a bare loop on all SMs: one instruction of the special-function unit each."""
    programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    x = torch.rand(programs * BLOCK, device=device)
    out = torch.empty_like(x)
    times = []
    for _ in range(1 + measurements):
        start = time.perf_counter()
        bare_exp_kernel[(programs,)](x, out, REPEATS, BLOCK)  # pyright: ignore[reportArgumentType]
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    # The first call compiles.
    return programs * BLOCK * REPEATS / statistics.median(times[1:])
