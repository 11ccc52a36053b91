"""The compiled library: its exponential, its instruction sets, its threads, and what happens without it."""

import ctypes
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalrn.ops import native, relation_quadratic

NEEDS_LIBRARY = pytest.mark.skipif(not native.supported_instruction_sets(), reason="no compiled kernels here")


def compiled_exp(x: Tensor, bounded: bool) -> Tensor:
    out = torch.empty_like(x)
    kernel = native.find_kernel("exp_array")
    assert kernel is not None
    count = ctypes.c_int64(x.numel())
    kernel(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), count, int(bounded))
    return out


@NEEDS_LIBRARY
@pytest.mark.parametrize("isa", native.INSTRUCTION_SETS)
def test_exponential(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in native.supported_instruction_sets():
        pytest.skip(f"no {isa} on this CPU")
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    x = torch.linspace(-87, 87, 100_001)
    exact = x.double().exp()
    # Rounding of the result and the polynomial; rounding of the argument in base 2.
    bound = 3e-7 + 1e-7 * x.abs()
    for bounded in (True, False):
        assert ((compiled_exp(x, bounded) / exact - 1).abs() <= bound).all()
    special = torch.tensor([float("-inf"), -1e30, -87.4, 0, 88.72, 88.73, 1e30, float("inf"), float("nan")])
    wanted = torch.tensor([0, 0, 0, 1, 3.4e38, float("inf"), float("inf"), float("inf"), float("nan")])
    torch.testing.assert_close(compiled_exp(special, False), wanted, rtol=3e-3, atol=0, equal_nan=True)


@NEEDS_LIBRARY
def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match="CAUSALRN_ISA: got 'mmx', wanted one of plain"):
        native.find_kernel("exp_array")


@NEEDS_LIBRARY
def test_unknown_kernel() -> None:
    with pytest.raises(RuntimeError, match="causalrn_future_kernel_.*the library is older than the package"):
        native.find_kernel("future_kernel")


@NEEDS_LIBRARY
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_threads_are_shared_with_torch() -> None:
    """Two OpenMP runtimes in one process would spin against each other."""
    program = "import causalrn.ops.native as n; n.load_library(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "load_library", partial(native.load_library, tmp_path / "_kernels.so"))


@pytest.mark.usefixtures("without_library")
def test_a_missing_library_is_told_once() -> None:
    q = torch.randn(1, 5, 1, 4)
    with pytest.warns(UserWarning, match="compiled kernels are missing") as warned:
        values = [relation_quadratic(q, q, eps=1e-5) for _ in range(2)]
    assert len(warned) == 1
    assert torch.equal(*values)
    assert native.supported_instruction_sets() == ()
    assert native.find_kernel("exp_array") is None
