"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and parameters (3) partitioned over all ranks."""

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
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from causalrn.system import check_range, optional_module
from causalrn.training.callbacks.log_steps import ends_a_step
from causalrn.training.strategies.zero_restore import restore_whole


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
        self._precision_plugin = precision_plugin

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

    def init_deepspeed(self) -> None:
        # Lightning warns about, and otherwise only repeats, what clips_gradients settles.
        assert self.lightning_module is not None
        assert self.model is not None
        if self.lightning_module.trainer.training:
            self._initialize_deepspeed_train(self.model)
        else:
            self._initialize_deepspeed_inference(self.model)

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

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        assert self.lightning_module is not None
        data = getattr(self.lightning_module.trainer, "datamodule", None)
        # For DeepSpeed's own reports only: training reads from the data's loader.
        self.config.setdefault(
            "train_micro_batch_size_per_gpu", max(1, getattr(data, "batch_size", 1) // self.world_size)
        )
        if getattr(self.precision_plugin, "autocast", False):
            self.config.setdefault(
                "torch_autocast",
                # Gradients are reduced in float32: an empty list of modules that would do with less.
                {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            )
        super()._format_config()


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
