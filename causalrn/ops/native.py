"""Finds the compiled kernels, chooses the instruction set to run those of the CPU with, and calls them."""

import ctypes
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

LIBRARY_PATH = Path(__file__).with_name("_kernels.so")
# In the order of causalrn_cpu_level() in csrc/cpu.cpp.
INSTRUCTION_SETS = ("plain", "avx2", "avx512")
ISA_VARIABLE = "CAUSALRN_ISA"
# The dtypes that all kernels read and write tensors in.
DTYPES = (torch.float32, torch.bfloat16)


@cache
def load_library(path: Path = LIBRARY_PATH) -> ctypes.CDLL | None:
    """The compiled kernels, or None (with one warning) where they were not built.

    torch is imported first, so that the library shares its OpenMP threads: two pools would spin against each other.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(
            f"causalrn runs its slower pure-PyTorch operators on the CPU, because the compiled kernels are missing "
            f"({error}). To build them, reinstall causalrn where a C++ compiler with OpenMP is installed.",
            stacklevel=3,
        )
        return None


def serves(x: Tensor) -> bool:
    """Whether the library is there and takes this tensor: on the CPU, of the dtypes above, and not empty."""
    return x.device.type == "cpu" and x.dtype in DTYPES and x.numel() > 0 and load_library() is not None


def triton_serves(x: Tensor) -> bool:
    """Whether Triton is there and its kernels take this tensor: of the same dtypes, and not empty."""
    return x.dtype in DTYPES and x.numel() > 0 and has_triton()


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def supported_instruction_sets() -> tuple[str, ...]:
    """The instruction sets that both the library and this CPU have, best last; empty without a library."""
    library = load_library()
    if library is None:
        return ()
    best: int = library.causalrn_cpu_level()
    return INSTRUCTION_SETS[: best + 1]


def fields(pointers: str, int64: str, float32: str = "", int32: str = "") -> list[tuple[str, type]]:
    """The fields of a kernel's arguments: names apart by spaces, in the order of the types and of the C++ structure.

    The last field of every structure is the number of threads.
    """
    kinds = {
        ctypes.c_void_p: pointers, ctypes.c_int64: int64, ctypes.c_float: float32, ctypes.c_int32: f"{int32} threads",
    }  # fmt: skip
    return [(name, kind) for kind, names in kinds.items() for name in names.split()]


def threads_for(work: int, per_thread: int) -> int:
    """Threads for so much work, of which each thread should have at least `per_thread`, in the same unit."""
    return min(torch.get_num_threads(), 1 + work // per_thread)


def call(
    name: str, arguments: type[ctypes.Structure], tensors: Mapping[str, Tensor | None], **numbers: float
) -> None:
    """Runs the library's function `name` for the best instruction set of this CPU.

    The environment variable CAUSALRN_ISA (plain, avx2 or avx512) asks for another instruction set.

    Args:
        arguments: the structure that the function takes a pointer to.
        tensors: those fields of it that are pointers; None is a null pointer.
        numbers: the other fields.

    Raises:
        MemoryError: no memory for the kernel's scratch space.
        ValueError: CAUSALRN_ISA names no instruction set that this CPU runs.
        RuntimeError: the library was built from other sources: it has no such function, or one of another structure.
    """
    library = load_library()
    assert library is not None
    function = find_kernel(library, name, arguments, os.environ.get(ISA_VARIABLE))
    pointers = {field: x.data_ptr() for field, x in tensors.items() if x is not None}
    if function(ctypes.byref(arguments(**pointers, **numbers))) != 0:
        shapes = ", ".join(f"{field} {tuple(x.shape)}" for field, x in tensors.items() if x is not None)
        raise MemoryError(f"{name}: no memory left for the scratch space of {shapes}")


# Every decoding step asks for a few kernels per layer.
@cache
def find_kernel(
    library: ctypes.CDLL, name: str, arguments: type[ctypes.Structure], isa: str | None
) -> Callable[..., int]:
    """The library's function `name` for an instruction set, or for the best one if that is None or ""."""
    supported = supported_instruction_sets()
    isa = isa or supported[-1]
    if isa not in supported:
        raise ValueError(f"{ISA_VARIABLE}: got {isa!r}, wanted one of {', '.join(supported)}")
    try:
        function, count_bytes = library[f"causalrn_{name}_{isa}"], library[f"causalrn_{name}_bytes_{isa}"]
    except AttributeError as error:
        raise RuntimeError(
            f"{error}: the library is older than the package, install causalrn again"
        ) from None
    count_bytes.restype = ctypes.c_int64
    last = getattr(arguments, arguments._fields_[-1][0])
    if (built := count_bytes()) != (wanted := last.offset + last.size):
        raise RuntimeError(
            f"{library._name}: {name} was built for arguments of {built} bytes, the package calls it with {wanted}: "
            "the library is of another version than the package, install causalrn again"
        )
    return function
