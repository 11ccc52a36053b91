"""The config's values hold after a resume, where a checkpoint would put back those of its own run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from torch.optim.lr_scheduler import LambdaLR


class ConfiguredValues(L.Callback):
    """Gives optimizers, schedules and early stopping the values that this run was configured with.

    A checkpoint holds, beside the moments and the step, every setting of the optimizer and the base of the schedule, and
    whatever the strategy, restoring it overwrites the new ones. The learning rate goes on where the new schedule is at the
    restored step: exactly for a LambdaLR, in proportion to the new base for others.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Callbacks are restored next, under some strategies.
        self.patience = [one.patience for one in early_stops(trainer)]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Optimizers are there, and under no strategy restored yet.
        self.groups: list[list[dict[str, Any]]] = [
            [{name: value for name, value in group.items() if name != "params"} for group in one.param_groups]
            for one in trainer.optimizers
        ]
        self.base_rates: list[list[Any]] = [
            list(getattr(one.scheduler, "base_lrs", [])) for one in trainer.lr_scheduler_configs
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is None:
            return
        for optimizer, groups in zip(trainer.optimizers, self.groups, strict=True):
            for group, configured in zip(optimizer.param_groups, groups, strict=True):
                # A schedule has noted the rate that it starts from, and decides the present one below.
                kept = {"lr": group["lr"]} if "initial_lr" in configured else {}
                group |= configured | kept
        for one, base_rates in zip(trainer.lr_scheduler_configs, self.base_rates, strict=True):
            set_rates(one.scheduler, base_rates)
        for one, patience in zip(early_stops(trainer), self.patience, strict=True):
            one.patience = patience


def early_stops(trainer: L.Trainer) -> list[EarlyStopping]:
    return [one for one in trainer.early_stopping_callbacks if isinstance(one, EarlyStopping)]


def set_rates(scheduler: Any, base_rates: list[Any]) -> None:
    """Puts a restored schedule on other base rates; one without any, as ReduceLROnPlateau, stays as it is."""
    if not base_rates:
        return
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, LambdaLR):
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(base_rates, scheduler.lr_lambdas, strict=True)
        ]
    else:
        rates = [
            group["lr"] * (new / old if old else 1.0)
            for group, new, old in zip(groups, base_rates, scheduler.base_lrs, strict=True)
        ]
    scheduler.base_lrs = base_rates
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
