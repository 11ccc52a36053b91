"""How large the gradient, the parameters and their updates are, block by block."""

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from causalrn.callbacks.log_steps import is_log_step


class Norms(L.Callback):
    """Logs `train/grad_norm` before clipping, and `norms/parameter/BLOCK` and `norms/update/BLOCK` of each block.

    Computed at the Trainer's log steps only, on the device. A block is `block_03` of the network, or a part beside the
    blocks such as `head`. Updates need a copy of the parameters during each logged step. Parameters that a strategy
    keeps empty outside of its layers (ZeRO-3) have no norms here.

    Args:
        updates: False leaves the updates out, and with them the copy.
    """

    def __init__(self, updates: bool = True) -> None:
        self.updates = updates
        self.before: list[Tensor] | None = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # The step that is about to be taken.
        if not is_log_step(trainer, trainer.global_step + 1):
            return
        parameters = trained_parameters(pl_module)
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        # Where gradients are clipped, their norm is known and logged there.
        if gradients and not trainer.gradient_clip_val:
            pl_module.log("train/grad_norm", total_norm(norms(gradients)))
        if not all(parameter.numel() for parameter in parameters.values()):
            return
        values = [parameter.detach() for parameter in parameters.values()]
        log_blocks(pl_module, "parameter", parameters, norms(values))
        if self.updates:
            self.before = [value.clone() for value in values]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.before is None:
            return
        parameters = trained_parameters(pl_module)
        after = [parameter.detach() for parameter in parameters.values()]
        torch._foreach_sub_(self.before, after)  # pyright: ignore[reportPrivateImportUsage]
        log_blocks(pl_module, "update", parameters, norms(self.before))
        self.before = None


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norm of each tensor, in float32 whatever the tensors are; of the whole where ranks hold shards."""
    found = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in found]


def total_norm(norms: Iterable[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms)))


def log_blocks(
    module: L.LightningModule, kind: str, names: Iterable[str], parameter_norms: Sequence[Tensor]
) -> None:
    blocks: dict[str, list[Tensor]] = {}
    for name, norm in zip(names, parameter_norms, strict=True):
        blocks.setdefault(block_of(name), []).append(norm)
    module.log_dict({f"norms/{kind}/{block}": total_norm(found) for block, found in blocks.items()})


def block_of(name: str) -> str:
    """`network.blocks.3.mixer.q_proj.weight` is of block_03, `network.head.weight` of head."""
    first, *rest = name.removeprefix("network.").split(".")
    return f"block_{int(rest[0]):02d}" if first == "blocks" else first
