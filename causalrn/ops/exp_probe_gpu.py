"""A GPU loop of nothing but exp2, the limit that the quadratic kernels are held against."""

from collections.abc import Callable

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


def make_bare_loop(device: torch.device) -> tuple[Callable[[], object], int]:
    """A call that starts the loop, and the number of exponentials it evaluates."""
    programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    x = torch.rand(programs * BLOCK, device=device)
    out = torch.empty_like(x)

    def loop() -> None:
        bare_exp_kernel[(programs,)](x, out, REPEATS, BLOCK)  # pyright: ignore[reportArgumentType]

    return loop, programs * BLOCK * REPEATS
