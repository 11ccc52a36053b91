"""Steps have the batches that they should, whatever the epoch, and validations come after so many of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

import datamodules.prepare.__main__ as prepare
from causalrn import fit
from causalrn.sweeps.grid import read_sweep
from causalrn.sweeps.points import plan_points
from causalrn.training.checkpoint import read_checkpoint
from causalrn.training.trainer import Trainer
from datamodules.tasks.copying import CopyDataModule
from tests.test_fit import CONFIG, error_of


class Recorder(L.Callback):
    """Writes what happened into the run folder: batches of each step, steps of each validation, the samples given."""

    def __init__(self) -> None:
        self.batches: Counter[int] = Counter()
        self.validations: list[int] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches[trainer.global_step] += 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.validations.append(trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seen = {
            "batches": [self.batches[step] for step in sorted(self.batches)],
            "validations": self.validations,
            "position": trainer.datamodule.position.index,  # pyright: ignore[reportAttributeAccessIssue]
        }
        Path(trainer.default_root_dir, "seen.yaml").write_text(yaml.safe_dump(seen))


def run(
    tmp_path: Path, *flags: str, name: str = "run", data: dict[str, Any] | None = None, **trainer: Any
) -> Any:
    """What the recorder saw of a run."""
    content = {
        **CONFIG,
        "trainer": {
            **CONFIG["trainer"],
            "callbacks": [{"class_path": "tests.training.callbacks.test_whole_steps.Recorder"}],
            **trainer,
        },
        "data": data or CONFIG["data"],
    }
    config = tmp_path / f"{name}.yaml"
    config.write_text(yaml.safe_dump(content))
    fit.main(["--config", str(config), "--run_dir", str(tmp_path / name), *flags])
    return yaml.safe_load((tmp_path / name / "seen.yaml").read_text())


@pytest.mark.parametrize("batches_per_epoch", [1, 7, 10])
def test_every_step_has_all_of_its_batches(tmp_path: Path, batches_per_epoch: int) -> None:
    seen = run(
        tmp_path,
        f"--data.init_args.batches_per_epoch={batches_per_epoch}",
        max_steps=4,
        accumulate_grad_batches=5,
        val_check_interval=2,
    )
    assert seen == {"batches": [5, 5, 5, 5], "validations": [2, 4], "position": 4 * 5 * 4}


def test_a_shard_of_one_batch_is_not_trained_on_a_fifth(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    # 20 blocks of 16 bytes in training: one batch of 16.
    text.write_text("all work and no play makes jack a dull boy; " * 8)
    prepare.main(
        ["text", "--input", str(text), "--output", str(tmp_path / "shards"), "--split-by", "position"]
    )
    data = {
        "class_path": "datamodules.text.TextDataModule",
        "init_args": {
            "shards_dir": str(tmp_path / "shards"),
            "context_length": 8,
            "batch_size": 32,
            "vocab_size": 256,
        },
    }
    seen = run(
        tmp_path,
        "--model=causalrn.training.LanguageModelModule",
        "--model.init_args.network.init_args.vocab_size=256",
        data=data,
        max_steps=2,
        accumulate_grad_batches=5,
        val_check_interval=1,
    )
    assert seen == {"batches": [5, 5], "validations": [1, 2], "position": 2 * 5 * 32}


@pytest.mark.slow
def test_gradients_are_those_of_all_batches(tmp_path: Path) -> None:
    """One step of five batches of 4 is the step of one batch of 20, also where an epoch has one batch."""
    options = {"max_steps": 3, "gradient_clip_val": None, "val_check_interval": 3}
    run(tmp_path, "--data.init_args.batches_per_epoch=1", name="small", accumulate_grad_batches=5, **options)
    run(tmp_path, "--data.init_args.batch_size=20", name="large", **options)
    small, large = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"]
        for name in ("small", "large")
    )
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_validations_come_after_so_many_steps(tmp_path: Path) -> None:
    for accumulated in (1, 2, 3):
        seen = run(
            tmp_path,
            name=f"by{accumulated}",
            max_steps=6,
            accumulate_grad_batches=accumulated,
            val_check_interval=3,
        )
        assert seen["validations"] == [3, 6]
        assert seen["batches"] == [accumulated] * 6


def test_a_share_of_an_epoch_ends_with_a_step(tmp_path: Path) -> None:
    seen = run(
        tmp_path,
        "--data.init_args.batches_per_epoch=5",
        max_steps=6,
        accumulate_grad_batches=2,
        # Half of 6 batches, the 5 and one more that ends the third step: down to the end of the first.
        val_check_interval=0.5,
        check_val_every_n_epoch=1,
    )
    assert seen["validations"] == [1, 2, 3, 4, 5, 6]
    assert seen["batches"] == [2] * 6


def test_epochs_of_another_length_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for limit, wanted in (
        ("7", "want limit_train_batches 6"),
        ("1", "want accumulate_grad_batches of at most 1"),
    ):
        config = tmp_path / "small.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        args = ["--config", str(config), "--run_dir", str(tmp_path / limit)]
        args += ["--trainer.accumulate_grad_batches", "2", "--trainer.limit_train_batches", limit]
        line = error_of(fit.main, args, capsys)
        assert f"the {limit} batches of an epoch are not divisible by accumulate_grad_batches 2" in line
        assert wanted in line


@pytest.mark.slow
def test_a_run_that_counted_batches_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, max_steps=4, accumulate_grad_batches=2, val_check_interval=4)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    resume = ["--resume", str(tmp_path / "run"), "--trainer.max_steps"]
    fit.main([*resume, "8"])
    assert "counted batches" not in capsys.readouterr().err
    content = read_checkpoint(checkpoint)
    # As it was written before there was such a callback.
    del content["callbacks"]["WholeSteps"]
    # Not over the file, whose pages the tensors are.
    torch.save(content, tmp_path / "earlier.ckpt")
    (tmp_path / "earlier.ckpt").replace(checkpoint.resolve())
    fit.main([*resume, "12"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "counted batches" in line]
    assert line.startswith("warning: val_check_interval 4 counts optimizer steps now")
    assert "which made it 2 steps (accumulate_grad_batches 2)" in line
    seen = yaml.safe_load((tmp_path / "run" / "seen.yaml").read_text())
    assert seen["batches"] == [2, 2, 2, 2]
    assert seen["validations"] == [12]


def test_in_python_too() -> None:
    trainer = Trainer(val_check_interval=3, accumulate_grad_batches=2, logger=False, accelerator="cpu")
    assert trainer.val_check_interval == 6
    share = Trainer(val_check_interval=0.5, accumulate_grad_batches=2, logger=False, accelerator="cpu")
    assert share.val_check_interval == 0.5
    data = CopyDataModule(batches_per_epoch=7)
    assert len(data.train_dataloader()) == 7


def test_a_sweep_counts_all_sequences_of_a_step(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    sweep = {
        "configs": ["small.yaml"],
        "grid": {"trainer.accumulate_grad_batches": [1, 3]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    once, thrice = plan_points(read_sweep(tmp_path / "sweep.yaml"))
    assert (once.sequences, thrice.sequences) == (4, 12)
    assert thrice.tokens == 3 * once.tokens
