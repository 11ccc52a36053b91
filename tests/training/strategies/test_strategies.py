"""Every strategy trains as one process does, and a run moves from each to the others by way of one file."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from causalrn import evaluate, export, fit, generate
from causalrn.training.checkpoint import read_checkpoint
from causalrn.training.loggers import read_metrics
from tests import ROOT
from tests.ranks import run_plan
from tests.training.strategies.test_checks import error_of

MIXER = "--model.init_args.network.init_args.mixer.init_args"
# 7 batches an epoch, where two make a step 8. Clipping bites at every step.
SMALL = [
    *("--config", str(ROOT / "configs/copy/quickstart.yaml"), "--trainer.accelerator", "cpu"),
    *("--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "7"),
    *("--trainer.gradient_clip_val", "0.3", "--trainer.limit_val_batches", "1"),
    # 33 channels: no two ranks can share them evenly.
    *("--model.init_args.learning_rate", "3e-3", f"{MIXER}.d_model", "33", f"{MIXER}.d_hidden", "33"),
    *(
        "--data.init_args.batch_size",
        "8",
        "--data.init_args.length",
        "4",
        "--data.init_args.val_samples",
        "8",
    ),
    *("--data.init_args.batches_per_epoch", "7"),
]
# Ends with a sample of text.
TEXT = [
    *("--config", str(ROOT / "configs/text/quickstart.yaml"), "--trainer.accelerator", "cpu"),
    *("--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", f"{MIXER}.d_model", "32"),
    *(f"{MIXER}.d_hidden", "32", "--model.init_args.network.init_args.n_layers", "1"),
]
TWO = ["--trainer.devices", "2"]
ZERO = "tests.cpu_deepspeed.CPUZeroStrategy"
STRATEGIES = {
    "one": ["--trainer.devices", "1"],
    "ddp": ["--config", str(ROOT / "configs/trainer/ddp.yaml"), *TWO],
    "fsdp": ["--config", str(ROOT / "configs/trainer/fsdp.yaml"), *TWO],
    **{
        f"zero{stage}": ["--trainer.strategy", ZERO, "--trainer.strategy.init_args.stage", f"{stage}", *TWO]
        for stage in (1, 2, 3)
    },
}
# Sums of other order in float32, grown over 20 steps.
NOISE = 2e-5


def arguments(folder: Path, name: str, strategy: str, *flags: str) -> list[str]:
    return [*SMALL, *STRATEGIES[strategy], "--run_dir", str(folder / name), *flags]


def curves(run_dir: Path) -> dict[str, list[float]]:
    rows = read_metrics(run_dir / "metrics.csv")
    names = ("train/loss", "train/grad_norm", "train/learning_rate", "val/loss")
    return {name: [row[name] for row in rows if name in row] for name in names}


def run(folder: Path, plan: list[list[str]], ranks: int) -> list[str | None]:
    """The error line of each training."""
    folder.mkdir()
    return [outcome["error"] for outcome in run_plan(plan, folder, ranks)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders of 20 steps: STRATEGY-K with K batches accumulated; STRATEGY-mixed, STRATEGY-text."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    folder = tmp_path_factory.mktemp("trained")
    for count in (1, 2):
        plan = [
            arguments(folder, f"{name}-{k}", name, "--trainer.max_steps", "20", *accumulate(k))
            for name in STRATEGIES
            for k in (1, 2)
            if (name == "one") == (count == 1)
        ]
        for name in ("one",) if count == 1 else ("fsdp", "zero3"):
            mixed = ["--trainer.precision", "bf16-mixed", "--trainer.max_steps", "7"]
            plan.append(arguments(folder, f"{name}-mixed", name, *mixed))
            shards = ["--data.init_args.shards_dir", str(folder / "shards")]
            plan.append([*TEXT, *shards, *STRATEGIES[name], "--run_dir", str(folder / f"{name}-text")])
        assert not any(run(folder / f"ranks{count}", plan, count))
    return folder


def accumulate(k: int) -> list[str]:
    return ["--trainer.accumulate_grad_batches", str(k)]


@pytest.mark.slow
def test_strategies_train_alike(trained: Path) -> None:
    for k in (1, 2):
        one = curves(trained / f"one-{k}")
        assert len(one["train/loss"]) == len(one["train/grad_norm"]) == len(one["train/learning_rate"]) == 20
        assert min(one["train/grad_norm"]) > 0.3
        for name in STRATEGIES:
            for metric, values in curves(trained / f"{name}-{k}").items():
                assert values == pytest.approx(one[metric], rel=NOISE), (
                    f"{metric} of {name}, accumulating {k}"
                )


@pytest.mark.slow
def test_mixed_precision_is_autocast_everywhere(trained: Path) -> None:
    one = curves(trained / "one-mixed")
    for name in ("fsdp", "zero3"):
        for metric, values in curves(trained / f"{name}-mixed").items():
            # bfloat16 has 8 digits, and averages of rounded gradients differ in the order of rounding.
            assert values == pytest.approx(one[metric], rel=5e-3), f"{metric} of {name}"
        whole = read_checkpoint(trained / f"{name}-mixed" / "checkpoints" / "last.ckpt")
        assert {weight.dtype for weight in whole["state_dict"].values()} == {torch.float32}


@pytest.mark.slow
def test_sharded_parameters_write_the_same_text(trained: Path) -> None:
    samples = [(trained / f"{name}-text" / "sample.txt").read_text() for name in ("one", "fsdp", "zero3")]
    assert len(samples[0]) > 10
    assert samples[0] == samples[1] == samples[2]


@pytest.mark.slow
def test_a_run_moves_between_strategies(trained: Path, tmp_path: Path) -> None:
    def moved(name: str, source: str, to: str) -> list[str]:
        """Arguments that continue a copy of a run, consolidated, for 5 steps."""
        checkpoints = tmp_path / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        shutil.copy(trained / source / "config.yaml", tmp_path / name)
        path = (trained / source / "checkpoints" / "last.ckpt").resolve()
        if path.is_dir():
            export.main(["consolidate", str(path), "--output", str(checkpoints / "whole.ckpt")])
        else:
            shutil.copy(path, checkpoints / "whole.ckpt")
        flags = ["--resume", str(checkpoints / "whole.ckpt"), "--trainer.max_steps", "25"]
        # The strategy of the run's own config has arguments that the next one does not take.
        (tmp_path / name / "config.yaml").write_text("seed_everything: 1\n")
        return arguments(tmp_path, name, to, *flags)

    moves = [
        ("fsdp", "zero3"),
        ("zero3", "zero1"),
        ("zero1", "fsdp"),
        ("one", "zero2"),
        ("zero2", "ddp"),
        ("zero3", "one"),
        ("one", "one"),
    ]
    for count in (1, 2):
        plan = [moved(f"{a}-{b}", f"{a}-1", b) for a, b in moves if (b == "one") == (count == 1)]
        assert not any(run(tmp_path / f"ranks{count}", plan, count))
    one = curves(tmp_path / "one-one")
    assert len(one["train/loss"]) >= 5
    for a, b in moves:
        for metric, values in curves(tmp_path / f"{a}-{b}").items():
            assert values == pytest.approx(one[metric], rel=NOISE), f"{metric} from {a} to {b}"


@pytest.mark.slow
def test_folders_are_read_as_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = read_checkpoint(trained / "one-1" / "checkpoints" / "last.ckpt")
    for name in ("fsdp", "zero1", "zero2", "zero3"):
        path = trained / f"{name}-1" / "checkpoints" / "last.ckpt"
        whole = read_checkpoint(path)
        assert one.keys() == whole.keys()
        assert one["network"] == whole["network"]
        for key, weight in one["state_dict"].items():
            torch.testing.assert_close(whole["state_dict"][key], weight, rtol=1e-4, atol=1e-5)
        (expected,), (state,) = one["optimizer_states"], whole["optimizer_states"]
        assert state["param_groups"][0]["params"] == expected["param_groups"][0]["params"]
        for number, moments in expected["state"].items():
            for moment, value in moments.items():
                torch.testing.assert_close(state["state"][number][moment], value, rtol=1e-3, atol=1e-6)
        evaluate.main(
            ["--checkpoint", str(path), "--accelerator", "cpu", "--output", str(tmp_path / "e.json")]
        )
        generate.main(["--checkpoint", str(path), "--prompt", "abcd", "--max-tokens", "5"])
        capsys.readouterr()
    pytest.importorskip("transformers")
    export.main(["huggingface", "--checkpoint", str(path), "--output", str(tmp_path / "huggingface")])
    assert (tmp_path / "huggingface" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_folder_binds_its_strategy_and_ranks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: str, *strategy: str) -> str:
        path = trained / f"{source}-1" / "checkpoints" / "last.ckpt"
        flags = ["--resume", str(path), "--trainer.max_steps", "21", "--trainer.devices", "1"]
        return error_of(fit.main, [*flags, *strategy], capsys)

    line = refused("zero2")
    assert "was written under ZeRO-2 by 2 ranks, and this run is ZeRO-2 on 1: want python -m" in line
    assert "causalrn.export consolidate" in line
    line = refused("zero1", "--trainer.strategy.init_args.stage", "2")
    assert "ZeRO-1 by 2 ranks, and this run is ZeRO-2 on 1" in line
    assert "ZeRO-3 by 2 ranks and SingleDeviceStrategy cannot read it" in refused(
        "zero3", "--trainer.strategy", "auto"
    )
    assert "under FSDP and SingleDeviceStrategy cannot read it" in refused(
        "fsdp", "--trainer.strategy", "auto"
    )
    broken = tmp_path / "broken.ckpt"
    for source, lost, wanted in (
        (
            "zero2",
            "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt",
            "1 of the 2 ranks' optimizer states",
        ),
        (
            "zero3",
            "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "1 of the 2 ranks' optimizer states",
        ),
        ("fsdp", "__1_0.distcp", "is incomplete"),
    ):
        shutil.copytree((trained / f"{source}-1" / "checkpoints" / "last.ckpt").resolve(), broken)
        (broken / lost).unlink()
        args = ["consolidate", str(broken), "--output", str(tmp_path / "new.ckpt")]
        assert wanted in error_of(export.main, args, capsys)
        shutil.rmtree(broken)
