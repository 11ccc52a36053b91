"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and parameters (3) partitioned over all ranks.

All that is used of DeepSpeed's inside stands here: `restore_whole` puts a checkpoint of any strategy into an engine, for
which DeepSpeed has no public way. tests/training/strategies train and restore under every stage.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout

from causalrn.system import check_range, optional_module
from causalrn.training.callbacks.log_steps import ends_a_step

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroPrecision(DeepSpeedPrecision):
    """Backward pass and step by DeepSpeed's engine, with Lightning's meaning of accumulation and clipping.

    `bf16-mixed` is autocast over float32 parameters; `bf16-true` is DeepSpeed's own mode, which casts every parameter
    to bfloat16 and keeps float32 copies in the optimizer.

    Args:
        precision: the Trainer's.
    """

    def __init__(self, precision: Literal["32-true", "bf16-mixed", "bf16-true"]) -> None:
        self.autocast = precision == "bf16-mixed"
        super().__init__("32-true" if self.autocast else precision)

    def backward(
        self, tensor: Tensor, model: L.LightningModule, optimizer: Steppable | None, *args: Any, **kwargs: Any
    ) -> None:
        engine = engine_of(model)
        is_boundary = ends_a_step(model.trainer)
        engine.set_gradient_accumulation_boundary(is_boundary)
        # Lightning has divided the loss by the number of accumulated batches already.
        engine.backward(tensor, *args, scale_wrt_gas=False, **kwargs)
        if not is_boundary:
            # Only counts the batch; Lightning calls optimizer_step at boundaries alone.
            engine.step()

    def optimizer_step(
        self, optimizer: Steppable, model: L.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        if model.trainer.gradient_clip_val:
            # The engine clips within its step; the norm is that before clipping.
            model.log("train/grad_norm", engine_of(model).get_global_grad_norm())
        return result


def engine_of(model: L.LightningModule) -> Any:
    """DeepSpeed's engine, which the Trainer calls its model."""
    return model.trainer.model


class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO with the batch, accumulation and clipping of every other strategy.

    Args:
        stage: 1 partitions the optimizer state, 2 also gradients, 3 also parameters.
        offload: holds the optimizer state, and under stage 3 the parameters, in host memory.
        bucket_size: elements that are reduced or gathered at once.
        config: further DeepSpeed settings; sections are merged, values win over those from here.
        timeout: of the collectives.

    Raises:
        ValueError: deepspeed is not installed.
    """

    strategy_name = "zero"
    # Lightning's own clipping hook is not called: the engine clips.
    clips_gradients = True

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload: bool = False,
        bucket_size: int = 200_000_000,
        config: dict[str, Any] | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        optional_module("deepspeed", "deepspeed", f"{type(self).__name__}")
        check_range(self, "[1, inf)", bucket_size=bucket_size)
        super().__init__(config=make_config(stage, offload, bucket_size, config or {}), timeout=timeout)
        self.stage = stage

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if isinstance(precision_plugin, DeepSpeedPrecision) and not isinstance(
            precision_plugin, ZeroPrecision
        ):
            precision_plugin = ZeroPrecision(precision_plugin.precision)  # pyright: ignore[reportArgumentType]
        DeepSpeedStrategy.precision_plugin.fset(self, precision_plugin)  # pyright: ignore[reportOptionalCall]

    @property
    def handles_gradient_accumulation(self) -> bool:
        # See ZeroPrecision: a last, incomplete accumulation of an epoch then takes its step, as elsewhere.
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        # The engine is told by set_gradient_accumulation_boundary, see ZeroPrecision.
        yield

    def check_accelerator(self) -> None:
        """Raises a ValueError where DeepSpeed cannot train."""
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise ValueError(
                f"{type(self).__name__} needs CUDA GPUs: got accelerator {type(self.accelerator).__name__}; want the "
                "overlay ddp or fsdp on a CPU"
            )

    def setup_environment(self) -> None:
        self.check_accelerator()
        # Past Lightning's own check, which is the same.
        DDPStrategy.setup_environment(self)
        assert isinstance(self.config, dict)
        assert self.lightning_module is not None
        data = getattr(self.lightning_module.trainer, "datamodule", None)
        # It serves DeepSpeed's own reports only: training reads from the data's loader.
        batch = max(1, getattr(data, "batch_size", 1) // self.world_size)
        self.config.setdefault("train_micro_batch_size_per_gpu", batch)
        if getattr(self.precision_plugin, "autocast", False):
            # Gradients are reduced in float32: no module is safe in a lower precision.
            settings = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            self.config.setdefault("torch_autocast", settings)

    def init_deepspeed(self) -> None:
        with warnings.catch_warnings():
            # `clips_gradients` says the same to our modules.
            warnings.filterwarnings("ignore", "Since DeepSpeed handles gradient clipping internally")
            super().init_deepspeed()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A ZeRO folder of as many ranks, or one file of any strategy."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return super().load_checkpoint(path, weights_only)
        assert self.lightning_module is not None
        # Mapped, not read: each rank copies its part only.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        restore_whole(
            self.deepspeed_engine,
            self.lightning_module,
            checkpoint,
            with_optimizer=self.lightning_module.trainer.state.fn == TrainerFn.FITTING,
        )
        return checkpoint


def make_config(stage: int, offload: bool, bucket_size: int, further: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config; `further` is merged into it section by section."""
    host = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW is vectorised on the CPU too, and needs no compiler there.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size,
            **({"offload_optimizer": host} if offload else {}),
            **({"offload_param": host} if offload and stage == 3 else {}),
        },
    }
    for name, value in further.items():
        is_section = isinstance(value, dict) and isinstance(config.get(name), dict)
        config[name] = {**config[name], **value} if is_section else value
    return config


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
