"""Every strategy trains alike: the losses and gradient norms of one process on the same global batch."""

from pathlib import Path

import pytest

from causalrn.loggers import read_metrics
from tests.ranks import run_plan

ROOT = Path(__file__).parents[1]
MIXER = "--model.init_args.network.init_args.mixer.init_args"
SMALL = [
    *("--config", str(ROOT / "configs/copy/quickstart.yaml"), "--trainer.accelerator", "cpu"),
    *("--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "20"),
    *("--model.init_args.learning_rate", "3e-3", f"{MIXER}.d_model", "32", f"{MIXER}.d_hidden", "32"),
    *(
        "--data.init_args.batch_size",
        "8",
        "--data.init_args.length",
        "4",
        "--data.init_args.val_samples",
        "8",
    ),
]
TWO = ["--trainer.devices", "2"]
ZERO = ["--trainer.strategy", "tests.cpu_deepspeed.CPUZeroStrategy", "--trainer.strategy.init_args.stage"]
STRATEGIES = {
    "one": ["--trainer.devices", "1"],
    "ddp": ["--config", str(ROOT / "configs/trainer/ddp.yaml"), *TWO],
    "fsdp": ["--config", str(ROOT / "configs/trainer/fsdp.yaml"), *TWO],
    "zero1": [*ZERO, "1", *TWO],
    "zero2": [*ZERO, "2", *TWO],
    "zero3": [*ZERO, "3", *TWO],
}


@pytest.mark.slow
def test_strategies_train_alike(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    # Clipping bites at every step; 7 batches an epoch leave a last accumulation of one.
    steps = ["--trainer.max_steps", "20", "--trainer.gradient_clip_val", "0.3"]
    plans = {
        (name, k): [
            *(*SMALL, *steps, *flags, "--run_dir", str(tmp_path / f"{name}-{k}")),
            *("--trainer.accumulate_grad_batches", str(k), "--data.init_args.batches_per_epoch", "7"),
            *("--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "7"),
        ]
        for k in (1, 2)
        for name, flags in STRATEGIES.items()
    }
    for count in (1, 2):
        folder = tmp_path / f"{count}"
        folder.mkdir()
        plan = [args for (name, _), args in plans.items() if (name == "one") == (count == 1)]
        for outcome in run_plan(plan, folder, count):
            assert outcome["error"] is None
    for k in (1, 2):
        one = curves(tmp_path / f"one-{k}")
        assert len(one["train/loss"]) == len(one["train/grad_norm"]) == 20
        assert min(one["train/grad_norm"]) > 0.3
        for name in STRATEGIES:
            for metric, values in curves(tmp_path / f"{name}-{k}").items():
                # Sums of other order in float32, grown over 20 steps.
                assert values == pytest.approx(one[metric], rel=2e-5), f"{metric} of {name}, accumulation {k}"


def curves(run_dir: Path) -> dict[str, list[float]]:
    rows = read_metrics(run_dir / "metrics.csv")
    names = ("train/loss", "train/grad_norm", "val/loss")
    return {name: [row[name] for row in rows if name in row] for name in names}
