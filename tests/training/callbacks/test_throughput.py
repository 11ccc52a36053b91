"""Speed, waiting and time left against a clock that only the test moves; utilisation against a given peak."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn

from causalrn import fit
from causalrn.cli import quiet_libraries
from causalrn.models import LanguageModel, Mixer, QuadraticRelation
from causalrn.models.cost import training_cost
from causalrn.training.callbacks import Throughput, throughput
from causalrn.training.callbacks.throughput import WaitingClock, why_without_cost
from causalrn.training.loggers import MetricsCSV, read_metrics
from causalrn.training.module import LanguageModelModule
from tests import ROOT
from tests.test_fit import CONFIG

ROWS, LENGTH = 3, 8


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Batches:
    """A loader that takes 3 seconds per batch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(len(self)):
            self.clock.now += 3
            yield {name: torch.randint(29, (ROWS, LENGTH)) for name in ("tokens", "targets")}


class Module(LanguageModelModule):
    """Takes 1 second per training batch and 100 per validation batch."""

    clock: Clock

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.clock.now += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.clock.now += 100
        super().validation_step(batch, batch_idx, dataloader_idx)


def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixer: Mixer, callback: Throughput
) -> list[dict[str, float]]:
    """Four optimizer steps of two batches, logged every second step, validated after the third."""
    quiet_libraries()
    clock = Clock()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    module = Module(LanguageModel(mixer, vocab_size=29, n_layers=1, max_length=LENGTH))
    module.clock = clock
    trainer = L.Trainer(
        max_steps=4,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=MetricsCSV(str(tmp_path)),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(module, Batches(clock), Batches(clock))
    return [row for row in read_metrics(tmp_path / "metrics.csv") if "train/step_seconds" in row]


def test_rates_leave_validation_out_and_time_left_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = QuadraticRelation(16, 24)
    first, second = train(tmp_path, monkeypatch, mixer, Throughput(peak_flops=1e6, peak_exps=1e4))
    assert [first["step"], second["step"]] == [1, 3]
    cost = training_cost(LanguageModel(mixer, 29, 1, LENGTH), LENGTH)
    for row in (first, second):
        # 2 steps of 2 batches of 4 seconds, 3 of which are waiting.
        assert row["train/step_seconds"] == 8
        assert row["train/data_share"] == 0.75
        assert row["train/samples_per_second"] == ROWS / 4
        assert row["train/tokens_per_second"] == ROWS * LENGTH / 4
        assert row["train/flops_per_second"] == pytest.approx(cost.flops * ROWS / 4)
        assert row["train/exps_per_second"] == pytest.approx(cost.exps * ROWS / 4)
        assert row["train/flops_utilisation"] == pytest.approx(cost.flops * ROWS / 4e6)
        assert row["train/exps_utilisation"] == pytest.approx(cost.exps * ROWS / 4e4)
        assert 1e8 < row["train/peak_memory_bytes"] < 1e12
    assert first["train/seconds_left"] == 16
    assert second["train/seconds_left"] == 0


class Identity(Mixer):
    """A mixer without a known cost."""

    def __init__(self) -> None:
        super().__init__(16, causal=True)
        self.weight = nn.Parameter(torch.ones(16))

    def reset_parameters(self, n_branches: int) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def init_cache(self, batch_size: int, **kwargs: Any) -> None:
        pass

    def extend(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self(x), cache

    def cache_bytes(self, length: int, cache_dtype: torch.dtype = torch.float32) -> int:
        return 0


def test_a_mixer_without_formulas_is_named_and_has_no_utilisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(
        UserWarning, match="FLOPs and exponentials are left out: the cost of Identity is not known"
    ):
        row, _ = train(tmp_path, monkeypatch, Identity(), Throughput())
    assert row["train/step_seconds"] == 8
    assert not any("flops" in name or "exps" in name for name in row)


def test_a_network_of_another_class_is_named() -> None:
    assert why_without_cost(nn.Linear(2, 2)) == "the cost of Linear is not known; want a LanguageModel"
    assert why_without_cost(LanguageModel(QuadraticRelation(4, 4), 5, n_layers=1, max_length=4)) == ""


@pytest.mark.slow
def test_the_extrapolation_recipe_is_measured(tmp_path: Path) -> None:
    """Its relation stands behind a short convolution."""
    recipe = ROOT / "configs" / "copy" / "extrapolate.yaml"
    small = [
        "--trainer.max_steps",
        "1",
        "--trainer.log_every_n_steps",
        "1",
        "--data.init_args.batch_size",
        "1",
    ]
    fit.main(
        [
            "--config",
            str(recipe),
            *small,
            "--run_dir",
            str(tmp_path / "run"),
            "--trainer.limit_val_batches",
            "0",
        ]
    )
    row = read_metrics(tmp_path / "run" / "metrics.csv")[0]
    assert row["train/flops_per_second"] > 0
    assert 0 < row["train/exps_utilisation"] < 1


@pytest.mark.parametrize("name", ["peak_flops", "peak_exps"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_peak_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        Throughput(**{name: value})


def test_a_configured_callback_replaces_the_default_one(tmp_path: Path) -> None:
    callbacks = [
        {"class_path": "causalrn.training.callbacks.Throughput", "init_args": {"peak_flops": 1e9}},
        {"class_path": "causalrn.training.callbacks.Norms", "init_args": {"updates": False}},
    ]
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 2, "callbacks": callbacks}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    fit.main(["--config", str(tmp_path / "small.yaml"), "--run_dir", str(tmp_path / "run")])
    row = read_metrics(tmp_path / "run" / "metrics.csv")[0]
    assert row["train/flops_utilisation"] == pytest.approx(row["train/flops_per_second"] / 1e9)
    # Measured on this CPU.
    assert 0 < row["train/exps_utilisation"] < 1
    assert "norms/parameter/block_00" in row
    assert not any(name.startswith("norms/update") for name in row)


def test_the_clock_hears_what_the_profiler_hears(tmp_path: Path) -> None:
    inner = SimpleProfiler(tmp_path, "profile")
    clock = WaitingClock(inner)
    with clock.profile("[_TrainingEpochLoop].train_dataloader_next"):
        pass
    waited = clock.seconds
    assert waited > 0
    with clock.profile("something else"):
        pass
    assert clock.seconds == waited
    assert {"[_TrainingEpochLoop].train_dataloader_next", "something else"} == inner.recorded_durations.keys()
