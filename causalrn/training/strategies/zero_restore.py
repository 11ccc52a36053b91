"""Puts a checkpoint that is one file into a running ZeRO engine: weights, float32 copies and optimizer state."""

from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def restore_whole(engine: Any, module: nn.Module, checkpoint: dict[str, Any], with_optimizer: bool) -> None:
    """Loads whole weights, and AdamW's state where the checkpoint holds it; every rank keeps its own part.

    Args:
        engine: DeepSpeed's, just initialized.
        module: what it wraps.
        checkpoint: `state_dict` and `optimizer_states` as one process writes them.
        with_optimizer: False under evaluation, whose engine has none.

    Raises:
        ValueError: weights are missing or of another shape.
    """
    weights = checkpoint["state_dict"]
    named = dict(module.named_parameters())
    wrong = [
        name
        for name, parameter in named.items()
        if name not in weights or weights[name].shape != getattr(parameter, "ds_shape", parameter.shape)
    ]
    if wrong:
        raise ValueError(
            f"checkpoint does not fit the model: {', '.join(wrong[:3])} missing or of another shape"
        )
    for name, parameter in named.items():
        copy_weight(parameter, weights[name])
    if not with_optimizer:
        return
    optimizer = engine.optimizer
    flats = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    stage_3 = flats is not None
    flats = flats if stage_3 else optimizer.single_partition_of_fp32_groups
    for name, parameter in named.items():
        set_partition(parameter, weights[name], None, stage_3)
    saved = next(iter(checkpoint.get("optimizer_states", [])), None)
    if saved is None or not saved["state"]:
        return
    step = next(iter(saved["state"].values()))["step"]
    for flat in flats:
        optimizer.optimizer.state[flat] = {
            "step": torch.as_tensor(step).to(flat.device, torch.float32, copy=True),
            **{name: torch.zeros_like(flat) for name in MOMENTS},
        }
    if not stage_3:
        optimizer._lazy_init_hp_params_optimizer_state()
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, named.values(), strict=True):
        for moment in MOMENTS:
            set_partition(parameter, saved["state"][number][moment], moment, stage_3)
    for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=False):
        group |= {name: value for name, value in before.items() if name != "params"}


@torch.no_grad()
def copy_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """The parameter as the forward pass reads it."""
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value)
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        if parameter.numel() == value.numel():
            parameter.copy_(value)


def set_partition(parameter: nn.Parameter, value: Tensor, moment: str | None, stage_3: bool) -> None:
    """This rank's part of the float32 copy of a parameter, or of one of its moments."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    key = () if moment is None else (moment,)
    if stage_3:
        size, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank()  # pyright: ignore
        padded = value.new_zeros(size * torch.distributed.get_world_size())
        padded[: value.numel()] = value.flatten()
        write = safe_set_local_optimizer_state if key else safe_set_local_fp32_param
        write(parameter, padded[rank * size : (rank + 1) * size], *key)
    else:
        write = safe_set_full_optimizer_state if key else safe_set_full_fp32_param
        write(parameter, value, *key)
