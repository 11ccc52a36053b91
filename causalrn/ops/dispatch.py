"""Defines the PyTorch operators: the dispatcher sends each call to the kernel of its tensors' device."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage]

from causalrn.ops import native


def define(
    name: str, schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> CustomOpDef:
    """Registers the operator `causalrn::name`, which has a kernel for each kind of device.

    Args:
        schema: arguments and results. They are flat: no types of ours.
        cpu: serves every device that has no kernel of its own, too.
        fake: gives results of the right shapes and dtypes without computing them.
    """
    operator = torch.library.custom_op(f"causalrn::{name}", cpu, mutates_args=(), schema=schema)
    operator.register_kernel("cuda", cuda)
    operator.register_fake(fake)
    return operator


class Kernels(NamedTuple):
    """The modules that hold a relation's kernels: the same functions of the same arguments in each.

    Attributes:
        cpu: calls the compiled library; its `serves` says which tensors that takes.
        gpu: name of the module of the Triton kernels, which is imported on a GPU only.
        eager: plain PyTorch for all tensors.
    """

    cpu: ModuleType
    gpu: str
    eager: ModuleType

    def on_devices(self, run: Callable[..., Any], by: int = 0) -> dict[str, Callable[..., Any]]:
        """An operator's kernels for `define`, each of which is run(module, *arguments).

        Args:
            by: index of the argument that the module is chosen by.
        """
        return {
            "cpu": lambda *args: run(self.cpu if self.cpu.serves(args[by]) else self.eager, *args),
            "cuda": lambda *args: run(
                import_module(self.gpu) if native.triton_serves(args[by]) else self.eager, *args
            ),
        }


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, norms and exponentials: float64 for float64, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32
