"""How large the gradient, the parameters and their updates are, block by block."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from causalrn.training.callbacks.log_steps import is_log_step, write_metrics


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
        self.found: dict[str, Tensor] = {}
        self.before: list[Tensor] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        named = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
        self.parameters = list(named.values())
        # Under ZeRO-3 only the layers gather parameters; that they are whole here would be chance, as after a resume.
        self.whole = not any(hasattr(parameter, "ds_id") for parameter in self.parameters)
        self.blocks = list(dict.fromkeys(block_of(name) for name in named))
        indices = [self.blocks.index(block_of(name)) for name in named]
        self.block_indices = torch.tensor(indices, device=pl_module.device)

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        # The step that is about to be taken.
        if not is_log_step(trainer, trainer.global_step + 1):
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # The module logs the norm where it clips gradients.
        if gradients and not trainer.gradient_clip_val:
            self.found["train/grad_norm"] = torch.linalg.vector_norm(norms(gradients))[None]
        if self.whole:
            values = [parameter.detach() for parameter in self.parameters]
            self.found["norms/parameter"] = self.by_block(norms(values))
            self.before = [value.clone() for value in values] if self.updates else None

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if not self.found:
            return
        if self.before is not None:
            for before, parameter in zip(self.before, self.parameters, strict=True):
                before.sub_(parameter.detach())
            self.found["norms/update"] = self.by_block(norms(self.before))
        names = [
            f"{name}/{block}" if name.startswith("norms/") else name
            for name in self.found
            for block in (self.blocks if name.startswith("norms/") else [""])
        ]
        # The one wait for the device.
        values = torch.cat(list(self.found.values())).tolist()
        write_metrics(trainer, dict(zip(names, values, strict=True)))
        self.found, self.before = {}, None

    def by_block(self, parameter_norms: Float[Tensor, " P"]) -> Float[Tensor, " N"]:
        sums = parameter_norms.new_zeros(len(self.blocks))
        return sums.index_add_(0, self.block_indices, parameter_norms.square()).sqrt()


def norms(tensors: Sequence[Tensor]) -> Float[Tensor, " P"]:
    """Euclidean norm of each tensor, in float32 at least. Where ranks hold shards it is that of the whole tensor."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    # The dtype of the norm itself would do, but torch 2.14 has no rule for that on sharded tensors.
    found = [torch.linalg.vector_norm(one.to(dtype)) for one in tensors]
    return torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in found])


def block_of(name: str) -> str:
    """`network.blocks.3.mixer.q_proj.weight` is of block_03, `network.head.weight` of head."""
    first, *rest = name.removeprefix("network.").split(".")
    return f"block_{int(rest[0]):02d}" if first == "blocks" else first
