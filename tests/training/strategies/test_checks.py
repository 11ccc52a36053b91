"""Settings that do not go together are one line, before any rank is started."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from causalrn import export, fit
from causalrn.training.errors import run_command
from tests import ROOT

QUICKSTART = [
    *("--config", str(ROOT / "configs/copy/quickstart.yaml"), "--trainer.max_steps", "1"),
    *("--trainer.accelerator", "cpu"),
]
CPU_ZERO = [
    *("--trainer.strategy", "tests.cpu_deepspeed.CPUZeroStrategy", "--trainer.strategy.init_args.stage", "2"),
    *("--trainer.devices", "1"),
]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is optional"
)


def overlay(name: str) -> list[str]:
    return ["--config", str(ROOT / f"configs/trainer/{name}.yaml")]


def error_of(main, args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: main(args))
    assert exit_info.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return line


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (
            [*overlay("ddp"), "--trainer.devices", "3"],
            "batch_size 64 counts the samples of a step over all ranks .* want .* 63 or 66",
        ),
        ([*overlay("fsdp"), "--trainer.devices", "3"], "not divisible by 3 ranks"),
        ([*overlay("ddp"), "--trainer.devices", "1", "--trainer.num_nodes", "3"], "by 3 ranks"),
        ([*overlay("cpu"), "--trainer.gradient_clip_algorithm", "value"], "every strategy clips by norm"),
        ([*overlay("cpu"), "--trainer.precision", "16-true"], "16-true is too narrow.* want bf16-mixed"),
        pytest.param([*CPU_ZERO, "--trainer.precision", "16-mixed"], "too narrow", marks=needs_deepspeed),
        pytest.param(
            ["--trainer.strategy", "deepspeed_stage_2"],
            "own DeepSpeedStrategy .* want the overlay",
            marks=needs_deepspeed,
        ),
        pytest.param(overlay("deepspeed_zero2"), "needs CUDA GPUs: got .*CPU", marks=needs_deepspeed),
        pytest.param(
            [*overlay("deepspeed_zero3_offload"), "--trainer.devices", "2"], "CUDA", marks=needs_deepspeed
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings(flags: list[str], wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(fit.main, [*QUICKSTART, *flags, "--run_dir", str(tmp_path / "run")], capsys)
    assert re.search(wanted, line), line


def test_deepspeed_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    args = [*QUICKSTART, *overlay("deepspeed_zero1"), "--run_dir", str(tmp_path / "run")]
    line = error_of(fit.main, args, capsys)
    assert "needs the package deepspeed: pip install 'causalrn[deepspeed]'" in line


def test_consolidate_refuses_what_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.ckpt").write_text("one file")
    (tmp_path / "empty.ckpt").mkdir()
    (tmp_path / "there.ckpt").write_text("precious")
    for source, output, wanted in (
        ("none.ckpt", "new.ckpt", "no such file or folder"),
        ("file.ckpt", "new.ckpt", "one file already"),
        ("empty.ckpt", "new.ckpt", r"without checkpoint/ \(ZeRO\) or meta.pt \(FSDP\)"),
        ("empty.ckpt", "there.ckpt", "exists"),
    ):
        args = ["consolidate", str(tmp_path / source), "--output", str(tmp_path / output)]
        assert re.search(wanted, error_of(export.main, args, capsys))
        assert not (tmp_path / "new.ckpt").exists()
    assert (tmp_path / "there.ckpt").read_text() == "precious"
