"""The learning rate at each step, as it is set and as it is logged; what a module of another task must define."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from causalrn.cli import quiet_libraries
from causalrn.models import LanguageModel, LinearRelation
from causalrn.training.loggers import MetricsCSV, read_metrics
from causalrn.training.module import LanguageModelModule
from datamodules.tasks.copying import CopyDataModule


def factors(max_steps: int, **settings: Any) -> list[float]:
    network = LanguageModel(LinearRelation(4, 4), 5, n_layers=1, max_length=4)
    module = LanguageModelModule(network, learning_rate=2.0, warmup_steps=4, **settings)
    # Lightning lets a module have a trainer-like object only through its own attribute.
    module._trainer = SimpleNamespace(max_steps=max_steps)  # type: ignore[assignment]
    return [module.learning_rate_factor()(step) for step in range(max_steps + 1)]


def test_a_constant_rate_after_the_warm_up() -> None:
    assert factors(8) == [0.25, 0.5, 0.75, 1.0, *[1.0] * 5]


def test_the_cosine_begins_after_the_warm_up() -> None:
    rates = factors(14, final_learning_rate=1.0)
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 2)))
    assert rates[14] == 0.5


def test_a_line_over_the_second_half() -> None:
    rates = factors(20, final_learning_rate=0.0, decay="linear", decay_start=0.5)
    assert rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([0.1 * left for left in range(9, -1, -1)])


class UsedRates(L.Callback):
    """Keeps the rate that each optimizer step takes."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if len(self.rates) == trainer.global_step:
            self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_rate_of_the_step_is_logged_with_it(accumulated: int, tmp_path: Path) -> None:
    quiet_libraries()
    network = LanguageModel(LinearRelation(4, 4), vocab_size=29, n_layers=1, max_length=10)
    module = LanguageModelModule(
        network, learning_rate=0.5, warmup_steps=3, final_learning_rate=0.0, decay="linear"
    )
    used = UsedRates()
    trainer = L.Trainer(
        max_steps=8,
        accumulate_grad_batches=accumulated,
        log_every_n_steps=2,
        limit_val_batches=0,
        accelerator="cpu",
        logger=MetricsCSV(str(tmp_path)),
        callbacks=[used],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, CopyDataModule(batch_size=2, length=4, batches_per_epoch=8 * accumulated))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 3, 5, 7]
    factor = module.learning_rate_factor()
    for row in rows:
        assert row["train/learning_rate"] == pytest.approx(0.5 * factor(int(row["step"])))
        assert row["train/learning_rate"] == pytest.approx(used.rates[int(row["step"])])


def test_a_wrong_share_is_named() -> None:
    with pytest.raises(ValueError, match="decay_start.*got 1.5"):
        factors(8, decay_start=1.5)
