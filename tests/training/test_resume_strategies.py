"""Under every strategy: a run begins with given weights, and a resumed one takes the settings that it is given."""

import importlib.util
from pathlib import Path

import pytest

from causalrn import export
from causalrn.training.checkpoint import read_checkpoint
from tests.ranks import run_plan
from tests.training.strategies.test_strategies import NOISE, ROOT, SMALL, STRATEGIES, TWO, curves
from tests.training.test_preemption import assert_same

MODEL = "--model.init_args"
# Another rate, decay and memory of gradients; by the last two the first step after the checkpoint differs already.
OTHER = [
    *(f"{MODEL}.learning_rate", "3e-2", f"{MODEL}.weight_decay", "0.5"),
    *(f"{MODEL}.betas", "[0.5, 0.9]", f"{MODEL}.warmup_steps", "0"),
]


@pytest.mark.slow
def test_weights_and_settings_arrive(tmp_path: Path) -> None:
    # ZeRO-1 restores as ZeRO-2 does.
    names = ["one", "ddp", "fsdp", *(["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else [])]

    def begun(name: str, source: Path, strategy: str) -> list[str]:
        flags = ["--init_from", str(source), "--data.init_args.seed", "5", "--trainer.max_steps", "4"]
        return [*SMALL, *STRATEGIES[strategy], *flags, "--run_dir", str(tmp_path / name)]

    def resumed(name: str) -> list[str]:
        flags = ["--resume", str(tmp_path / name), "--run_dir", str(tmp_path / name)]
        return [*flags, *OTHER, "--trainer.max_steps", "8"]

    def run(plan: list[list[str]], ranks: int) -> None:
        folder = tmp_path / f"ranks{ranks}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        assert not any(outcome["error"] for outcome in run_plan(plan, folder, ranks))

    source = tmp_path / "source"
    start = [*SMALL, *STRATEGIES["one"], "--trainer.max_steps", "2", "--run_dir", str(source)]
    run([start, begun("one", source, "one"), resumed("one")], 1)
    many = [name for name in names if name != "one"]
    plan = [arguments for name in many for arguments in (begun(name, source, name), resumed(name))]
    # From the shards of one strategy into another.
    crossings = [(a, b) for a, b in (("fsdp", "ddp"), ("zero3", "fsdp")) if a in many]
    plan += [begun(f"{a}-{b}", tmp_path / a, b) for a, b in crossings]
    run(plan, 2)
    one = curves(tmp_path / "one")
    assert len(one["train/loss"]) == 8
    for name in many:
        for metric, values in curves(tmp_path / name).items():
            assert values == pytest.approx(one[metric], rel=10 * NOISE), f"{metric} of {name}"
        checkpoint = read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")
        (group,) = checkpoint["optimizer_states"][0]["param_groups"]
        assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.5, 0.9)), name
    run([begun(f"{a}-one", tmp_path / a, "one") for a, _ in crossings], 1)
    for a, b in crossings:
        expected = curves(tmp_path / f"{a}-one")
        for metric, values in curves(tmp_path / f"{a}-{b}").items():
            assert values == pytest.approx(expected[metric], rel=NOISE), f"{metric} of {b} from {a}"
    # As docs/scaling.md continues a run under another strategy.
    folder = tmp_path / "fsdp" / "checkpoints"
    export.main(["consolidate", str(folder / "last.ckpt"), "--output", str(folder / "whole.ckpt")])
    whole = read_checkpoint(folder / "whole.ckpt")
    moved = ["--resume", str(folder / "whole.ckpt"), "--config", str(ROOT / "configs/trainer/ddp.yaml"), *TWO]
    run([[*moved, "--trainer.max_steps", "9", "--run_dir", str(tmp_path / "fsdp")]], 2)
    assert len(curves(tmp_path / "fsdp")["train/loss"]) == 9
    assert_same(read_checkpoint(folder / "whole.ckpt")["state_dict"], whole["state_dict"], "whole.ckpt")
