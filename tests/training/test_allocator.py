"""Freed memory is kept: the same tensors made again cost no page faults."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from causalrn.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    x = [torch.empty(1_000_000).fill_(1) for _ in range(3)]

# The heap takes a few steps to find its size.
for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(setting: str) -> int:
    command = [sys.executable, "-c", PROGRAM, setting]
    # glibc's first value, fixed here: otherwise it adapts, to what depends on where the heap happens to lie.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is a function of glibc")
def test_freed_memory_is_kept() -> None:
    # 15 tensors of 4 MB have 14650 pages of 4 KiB.
    assert page_faults("default") > 14_000
    assert page_faults("keep") < 100
