"""A step whose loss is NaN, infinite or too large stops the run, or is left out."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from causalrn.models import describe
from causalrn.system import check_range


class FiniteLoss(L.Callback):
    """Looks at the loss before each optimizer step, when the weights that gave it are still there.

    `stop` raises a ValueError and leaves `bad_step-STEP-rank-RANK.pt` in the run folder: the batch, the loss, and the
    network with the norms of its gradients (`causalrn.training.checkpoint.load_network` reads it). On a device, where a look
    costs a synchronisation, it looks every `every_n_batches`. `skip` drops the gradients of a bad step on all ranks,
    so that weights and optimizer stay as they are, and counts it in `train/skipped_steps`.

    Args:
        policy: what to do about a bad step.
        max_skipped: with `skip`, the number of bad steps of a run at which it stops after all.
        max_loss: largest loss in nats per token that is not yet bad; None for any finite one.
        every_n_batches: with `stop`, how often a loss on a device is looked at.
    """

    def __init__(
        self,
        policy: Literal["stop", "skip"] = "stop",
        max_skipped: int = 10,
        max_loss: float | None = None,
        every_n_batches: int = 50,
    ) -> None:
        check_range(self, "[0, inf)", max_skipped=max_skipped)
        check_range(self, "(0, inf]", max_loss=max_loss)
        check_range(self, "[1, inf)", every_n_batches=every_n_batches)
        self.policy = policy
        self.max_skipped = max_skipped
        self.max_loss = max_loss
        self.every_n_batches = every_n_batches
        self.skipped = 0
        # Those of the batches that make up one optimizer step.
        self.losses: list[torch.Tensor] = []
        self.batches: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.policy == "skip" and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError("FiniteLoss(policy=skip) has no hold of DeepSpeed's gradients; want policy stop")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor
    ) -> None:
        self.losses.append(loss.detach() * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        losses, batches = self.losses, self.batches
        self.losses, self.batches = [], []
        if not losses:
            return
        if self.policy == "skip":
            self.skip(trainer, pl_module, optimizer, losses, batches)
            return
        if losses[0].device.type != "cpu" and trainer.global_step % self.every_n_batches:
            return
        for loss in losses:
            if not self.is_good(loss.item()):
                self.stop(trainer, pl_module, loss.item(), batches)

    def is_good(self, loss: float) -> bool:
        return abs(loss) < float("inf") and (self.max_loss is None or loss <= self.max_loss)

    def skip(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
        losses: list[torch.Tensor],
        batches: list[Any],
    ) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # With sharded weights this is the norm of this rank's shards; the ranks combine their flags below.
        norm = get_total_norm([one.to_local() if isinstance(one, DTensor) else one for one in gradients])
        bad = ~norm.isfinite()
        stacked = torch.stack(losses)
        bad = bad | ~stacked.isfinite().all()
        if self.max_loss is not None:
            bad = bad | (stacked > self.max_loss).any()
        # All ranks leave the step out, or none.
        bad = bad.to(torch.int32)
        if dist.is_initialized() and trainer.world_size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad.item():
            self.skipped += 1
            if self.skipped > self.max_skipped:
                worst = next(
                    (loss for loss in stacked.tolist() if not self.is_good(loss)), stacked[-1].item()
                )
                self.stop(trainer, pl_module, worst, batches)
            optimizer.zero_grad(set_to_none=True)
        pl_module.log("train/skipped_steps", float(self.skipped))

    def stop(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: float, batches: list[Any]) -> None:
        """Raises the ValueError, the dump written."""
        name = f"bad_step-{trainer.global_step}-rank-{trainer.global_rank}.pt"
        path = Path(trainer.default_root_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        torch.save(
            {
                "step": trainer.global_step,
                "loss": loss,
                "batches": batches,
                "gradient_norms": {name: grad.norm() for name, grad in gradients.items()},
                # Sharding replaces the classes that a description names: a module may have kept one.
                "network": getattr(pl_module, "description", None) or describe(pl_module.network),  # pyright: ignore[reportArgumentType]
                # Shards could be read only with their process group.
                "state_dict": {} if sharded else pl_module.state_dict(),
            },
            path,
        )
        skipped = f" after {self.max_skipped} steps were left out" if self.policy == "skip" else ""
        limit = "a finite one" if self.max_loss is None else f"one of at most {self.max_loss:g}"
        raise ValueError(
            f"training loss is {loss} at step {trainer.global_step}{skipped}; want {limit}: lower the learning rate, "
            f"clip gradients, or set the norms' eps above 0 (the batch and the weights are in {path})"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
