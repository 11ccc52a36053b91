"""The GPU's bare loop computes what it counts."""

import os
import subprocess
import sys

import pytest

INTERPRET = """
import torch, triton
from benchmarks.exp_probe_gpu import bare_exp_kernel
x = torch.linspace(-1, 1, 64)
out = torch.empty_like(x)
bare_exp_kernel[(4,)](x, out, 10, 16)
wanted = sum(torch.exp2(x + 1e-6 * n) for n in range(10))
torch.testing.assert_close(out, wanted, rtol=1e-5, atol=0)
print("equal")
"""


@pytest.mark.slow
def test_gpu_loop_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRET]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "equal"
