"""The paths of the CPU's operators: each compiled instruction set, and the path without a compiler."""

import pytest

from causalrn.ops import native

PATHS = (*native.INSTRUCTION_SETS, "eager")


def use_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes one of the paths within the test, which is skipped where this machine does not have it."""
    if path == "eager":
        monkeypatch.setattr(native, "serves", lambda x: False)
    elif path in native.supported_instruction_sets():
        monkeypatch.setenv(native.ISA_VARIABLE, path)
    else:
        pytest.skip(f"no {path} kernels or no such CPU here")
