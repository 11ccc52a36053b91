"""Operators: every device has a kernel, and the module of a kernel is chosen by the tensors."""

import sys
from types import ModuleType

import pytest
import torch

from causalrn.ops import native
from causalrn.ops.dispatch import Kernels, arithmetic_dtype


def named(name: str, **functions) -> ModuleType:
    module = ModuleType(name)
    for key, function in functions.items():
        setattr(module, key, function)
    return module


def test_the_module_is_chosen_by_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = named("cpu", serves=lambda x: x.dtype is torch.float32)
    monkeypatch.setitem(sys.modules, "their_gpu", named("their_gpu"))
    kernels = Kernels(cpu, "their_gpu", named("eager")).on_devices(
        lambda module, *args: module.__name__, by=1
    )
    narrow, wide = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    assert [kernels["cpu"](wide, narrow), kernels["cpu"](narrow, wide)] == ["cpu", "eager"]
    monkeypatch.setattr(native, "has_triton", lambda: True)
    assert [kernels["cuda"](wide, narrow), kernels["cuda"](narrow, wide)] == ["their_gpu", "eager"]
    monkeypatch.setattr(native, "has_triton", lambda: False)
    assert kernels["cuda"](wide, narrow) == "eager"


def test_every_operator_serves_devices_without_a_kernel_of_their_own() -> None:
    names = ("normalise", "stored_linear", "relation_linear", "relation_quadratic", "relation_quadratic_step")
    for name in names:
        for key in ("CompositeExplicitAutograd", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"causalrn::{name}", key), (name, key)


def test_arithmetic_is_in_float32_at_least() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    found = [arithmetic_dtype(torch.zeros(1, dtype=dtype)) for dtype in dtypes]
    assert found == [torch.float64, torch.float32, torch.float32, torch.float32]
