"""Finds the compiled CPU kernels and the instruction set to run them with."""

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

LIBRARY_PATH = Path(__file__).with_name("_kernels.so")
# In the order of causalrn_cpu_level() in csrc/cpu.cpp.
INSTRUCTION_SETS = ("plain", "avx2", "avx512")
ISA_VARIABLE = "CAUSALRN_ISA"


@cache
def load_library(path: Path = LIBRARY_PATH) -> ctypes.CDLL | None:
    """The compiled kernels, or None (with one warning) where they were not built.

    Importing torch first makes the library share torch's OpenMP threads: two pools would spin against each other.
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


def supported_instruction_sets() -> tuple[str, ...]:
    """The instruction sets that both the library and this CPU have, best last; empty without a library."""
    library = load_library()
    if library is None:
        return ()
    best: int = library.causalrn_cpu_level()
    return INSTRUCTION_SETS[: best + 1]


def find_kernel(name: str, arguments: type[ctypes.Structure]) -> Callable[..., int] | None:
    """The library's function `name` for the best instruction set of this CPU, or None without a library.

    The environment variable CAUSALRN_ISA (plain, avx2 or avx512) asks for another instruction set.

    Args:
        arguments: the structure that the function takes a pointer to.

    Raises:
        ValueError: CAUSALRN_ISA names no instruction set that this CPU runs.
        RuntimeError: the library was built from other sources: it has no such function, or one of another structure.
    """
    library = load_library()
    return None if library is None else find_variant(library, name, arguments, os.environ.get(ISA_VARIABLE))


# Every decoding step asks for a few kernels per layer.
@cache
def find_variant(
    library: ctypes.CDLL, name: str, arguments: type[ctypes.Structure], isa: str | None
) -> Callable[..., int]:
    """As `find_kernel`, for an instruction set that is named or, if None or "", the best one."""
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
