"""Where the tests of the Triton kernels run: on a GPU, or else under Triton's interpreter in a pytest of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

# Triton reads the variable once, when it is first imported, and patches itself: it must not be set in this process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HAS_TRITON = find_spec("triton") is not None
needs_device = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()),
    reason="runs under the interpreter, started by test_under_the_interpreter",
)
starts_interpreter = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED or torch.cuda.is_available(),
    reason="the kernels run in this process, or nowhere",
)


def assert_passes_interpreted(path: str) -> None:
    """Runs the tests of this file under the interpreter."""
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout[-10_000:]


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference relative to the largest element; NaN where anything is."""
    return ((actual.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
