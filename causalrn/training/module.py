"""The LightningModule: how a language model is trained and validated."""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric

from causalrn.evaluation.metrics import IGNORE_INDEX, BitsPerByte, MeanLoss, metric_names, validation_metrics
from causalrn.models import LanguageModel, describe
from causalrn.ops.context_parallel import mean_over_sequence, sequence_part, whole_sequence
from causalrn.system import check_range
from causalrn.training.callbacks.log_steps import is_log_step
from causalrn.training.checkpoint import complete


class LanguageModelModule(L.LightningModule):
    """Trains a language model by next-token cross-entropy with AdamW, linear warm-up and a decay at the end.

    Batches are dicts of `tokens` and `targets`, int64 (B, T), with targets of -100 ignored. The data decide by which
    metrics the model is validated (`causalrn.evaluation.metrics.validation_metrics`). The learning rate
    rises linearly over `warmup_steps`, holds its peak until the share `decay_start` of `trainer.max_steps`, and falls to
    `final_learning_rate` at the last step; without one it stays constant (the official copying protocol).

    Args:
        network: the model to train.
        learning_rate: peak learning rate.
        warmup_steps: optimizer steps until the peak.
        final_learning_rate: learning rate at the last step, or None for a constant one.
        weight_decay: AdamW's; the official protocols use none.
        betas: AdamW's.
        decay: the way down, a half cosine (the official text protocol) or a line.
        decay_start: share of all steps after which it begins, never within the warm-up.

    Raises:
        ValueError: a setting out of its range, or a final_learning_rate without a peak to come down from.
    """

    def __init__(
        self,
        network: LanguageModel,
        learning_rate: float = 5e-4,
        warmup_steps: int = 50,
        final_learning_rate: float | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        decay: Literal["cosine", "linear"] = "cosine",
        decay_start: float = 0.0,
    ) -> None:
        super().__init__()
        # The schedule is made of shares of the peak.
        check_range(
            self, "[0, inf)" if final_learning_rate is None else "(0, inf)", learning_rate=learning_rate
        )
        check_range(
            self,
            "[0, inf)",
            warmup_steps=warmup_steps,
            final_learning_rate=final_learning_rate,
            weight_decay=weight_decay,
        )
        check_range(self, "[0, 1)", betas=betas, decay_start=decay_start)
        self.network = network
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.final_learning_rate = final_learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.decay: Literal["cosine", "linear"] = decay
        self.decay_start = decay_start
        self.description: dict[str, Any] | None = None
        self.val_metrics = nn.ModuleList()

    def configure_model(self) -> None:
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is not None:
            # It is described before, since sharding replaces the classes that a description names.
            self.description = self.description or describe(self.network)
            shard(self.network)

    def setup(self, stage: str) -> None:
        data = attached_data(self)
        if data is not None:
            check_fits(self.network, data)
        names = data.val_names if data is not None else ["val"]
        self.val_prefixes = prefixes_of(names)
        self.val_metrics = nn.ModuleList(nn.ModuleDict(validation_metrics(data)) for _ in names).to(
            self.device
        )

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        return self.network(tokens)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        targets = sequence_part(batch["targets"])
        nats = self.sum_nats(self(sequence_part(batch["tokens"])), targets)
        loss = mean_over_sequence(nats, (targets != IGNORE_INDEX).sum())
        # The mean over the ranks, each of which has seen its part of the batch.
        self.log_step("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def log_step(self, name: str, value: Tensor | float, **settings: Any) -> None:
        """Logs a value of those training steps that are logged.

        For any other, Lightning's log, which looks through all it knows of the metric, is pure cost: more than that of
        all callbacks together.
        """
        if is_log_step(self.trainer, self.trainer.global_step + 1):
            self.log(name, value, **settings)

    def sum_nats(self, logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Cross-entropy summed over the targets."""
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        targets = sequence_part(batch["targets"])
        logits = self(sequence_part(batch["tokens"]))
        nats = self.sum_nats(logits.float(), targets)
        for metric in self.metrics_of(dataloader_idx).values():
            if isinstance(metric, MeanLoss):
                metric.update(nats, (targets != IGNORE_INDEX).sum())
            elif isinstance(metric, BitsPerByte):
                metric.update(nats, metric.bytes_of(targets))
            else:
                # A string is right as a whole or not at all.
                metric.update(whole_sequence(logits.argmax(-1)), whole_sequence(targets))

    def on_validation_epoch_end(self) -> None:
        for index, prefix in enumerate(self.val_prefixes):
            for name, metric in self.metrics_of(index).items():
                # Every rank holds the same value already; sync_dist says so to Lightning.
                self.log(prefix.format(name), metric.compute(), prog_bar=name != "loss", sync_dist=True)
                metric.reset()

    def metrics_of(self, dataloader_idx: int) -> dict[str, Metric]:
        """The metrics of one validation set."""
        return cast(dict[str, Metric], dict(cast(nn.ModuleDict, self.val_metrics[dataloader_idx]).items()))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # The fused step is the fastest on CPU and on CUDA alike.
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def learning_rate_factor(self) -> Callable[[int], float]:
        """The learning rate at each optimizer step, as a share of the peak.

        Raises:
            ValueError: a decay is wanted, but the trainer has no max_steps to end it at.
        """
        # estimated_stepping_batches would not do: reading it early keeps the loader's state from being restored.
        total = self.trainer.max_steps
        if self.final_learning_rate is None:
            floor, total = 1.0, self.warmup_steps + 1
        elif total < 1:
            raise ValueError(f"a final_learning_rate needs trainer.max_steps >= 1: got {total}")
        else:
            floor = self.final_learning_rate / self.learning_rate

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            start = max(self.warmup_steps, self.decay_start * total)
            progress = min(1.0, max(0.0, (step - start) / max(1, total - start)))
            left = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
            return floor + (1 - floor) * left

        return factor

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # This step takes this rate: the schedule moves on after it.
        self.log_step("train/learning_rate", optimizer.param_groups[0]["lr"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # DeepSpeed clips, and tells the norm, within its step.
        if not gradient_clip_val or getattr(self.trainer.strategy, "clips_gradients", False):
            return
        # Lightning refuses to clip under bf16-mixed with a fused optimizer, although bf16 has no gradient scaler.
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), gradient_clip_val)
        self.log_step("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        complete(checkpoint, self)


def check_fits(network: LanguageModel, data: Any) -> None:
    """Raises a ValueError where a model has another vocabulary than the data, or takes shorter rows."""
    name = type(data).__name__
    if data.vocab_size != network.vocab_size:
        raise ValueError(
            f"vocab_size of the model and of the data differ: got {network.vocab_size} (model) and {data.vocab_size} "
            f"({name}); set model.init_args.network.init_args.vocab_size"
        )
    if network.max_length is not None and data.max_length > network.max_length:
        raise ValueError(
            f"a row of the data has {data.max_length} positions ({name}), and the model max_length={network.max_length}; "
            "set model.init_args.network.init_args.max_length"
        )


def logged_names(data: Any) -> list[str]:
    """The names under which metrics of a DataModule's validation sets are logged."""
    return [prefix.format(name) for name in metric_names(data) for prefix in prefixes_of(data.val_names)]


def prefixes_of(val_names: list[str]) -> list[str]:
    """The logged name of a metric on each validation set; one alone is not named."""
    return ["val/{}"] if len(val_names) == 1 else [f"val/{{}}/{name}" for name in val_names]


def attached_data(module: L.LightningModule) -> Any:
    """The DataModule that the Trainer runs with, or None where loaders were passed instead."""
    return getattr(module.trainer, "datamodule", None)
