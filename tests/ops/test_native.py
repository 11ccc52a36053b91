"""The compiled library: its exponential, its instruction sets, its threads, and what happens without it."""

import ctypes
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import read_probe
from causalrn.ops import (
    PairRule,
    PairTerms,
    exp_probe,
    native,
    normalisation,
    normalise,
    relation_quadratic,
    weight_only,
)
from causalrn.ops.linear import cpu as linear_cpu
from causalrn.ops.quadratic import cpu as quadratic_cpu

NEEDS_LIBRARY = pytest.mark.skipif(not native.supported_instruction_sets(), reason="no compiled kernels here")


def compiled_exp(x: Tensor, bounded: bool) -> Tensor:
    out = torch.empty_like(x)
    numbers = {"count": x.numel(), "repeats": 1, "bounded": bounded, "threads": 1}
    native.call("exp_array", exp_probe.Arguments, {"x": x, "out": out}, **numbers)
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
        compiled_exp(torch.zeros(1), False)


@NEEDS_LIBRARY
def test_unknown_kernel() -> None:
    with pytest.raises(RuntimeError, match="causalrn_future_kernel_.*the library is older than the package"):
        native.call("future_kernel", exp_probe.Arguments, {})


@pytest.mark.slow
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
        values = [relation_quadratic(q, q, PairTerms(), PairRule(1e-5)) for _ in range(2)]
    assert len(warned) == 1
    assert torch.equal(*values)
    assert native.supported_instruction_sets() == ()
    assert not native.serves(q)


# Every structure that a kernel takes, with the kernels that take it.
STRUCTURES = {
    exp_probe.Arguments: ("exp_array", "exp_bare_loop"),
    linear_cpu.Arguments: ("linear_forward", "linear_backward", "linear_pool", "linear_pool_backward"),
    normalisation.Arguments: ("normalise_forward", "normalise_backward"),
    quadratic_cpu.Arguments: ("quadratic_forward", "quadratic_backward"),
    quadratic_cpu.StepArguments: ("quadratic_step",),
    read_probe.Arguments: ("read_floats",),
    weight_only.Arguments: ("stored_linear",),
}


@NEEDS_LIBRARY
def test_every_structure_is_that_of_the_library() -> None:
    library = native.load_library()
    assert library is not None
    declared = set()
    for source in (Path(native.__file__).parent / "csrc").glob("*.cpp"):
        declared |= set(re.findall(r"^CAUSALRN_KERNEL\((\w+), ", source.read_text(), re.MULTILINE))
        assert "CAUSALRN_EXPORT(" not in source.read_text(), "a kernel without a structure is not compared"
    assert declared == {name for names in STRUCTURES.values() for name in names}
    for structure, names in STRUCTURES.items():
        for name in names:
            assert native.find_kernel(library, name, structure, None) is not None
            # A last field that takes the place of padding leaves sizeof as it is, and is found all the same.
            more = type(
                "More", (ctypes.Structure,), {"_fields_": [*structure._fields_, ("more", ctypes.c_int8)]}
            )
            with pytest.raises(
                RuntimeError, match=f"{name} was built for arguments of .* bytes, the package"
            ):
                native.find_kernel(library, name, more, None)


OTHER_LIBRARY = """
extern "C" int causalrn_cpu_level() { return 0; }
extern "C" int causalrn_quadratic_forward_plain(const void*) { __builtin_trap(); }
extern "C" int causalrn_normalise_forward_plain(const void*) { __builtin_trap(); }
extern "C" long long causalrn_normalise_forward_bytes_plain() { return 44; }
"""


@pytest.fixture
def other_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A library of other sources, whose kernels end the process if they are called."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    source, library = tmp_path / "other.cpp", tmp_path / "_kernels.so"
    source.write_text(OTHER_LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    monkeypatch.setattr(native, "load_library", partial(native.load_library, library))
    return library


def test_a_library_of_other_sources_is_not_called(other_library: Path) -> None:
    x = torch.randn(1, 5, 1, 4)
    with pytest.raises(RuntimeError) as caught:
        normalise(x, "layer", 1e-5)
    (line,) = str(caught.value).splitlines()
    assert line == (
        f"{other_library}: normalise_forward was built for arguments of 44 bytes, the package calls it with 64: the "
        "library is of another version than the package, install causalrn again"
    )
    # Before there was a size to compare.
    with pytest.raises(
        RuntimeError, match="quadratic_forward_bytes_plain: the library is older than the package"
    ):
        relation_quadratic(x, x, PairTerms(), PairRule(1e-5))
