"""Values that make no sense are refused by whatever takes them, for Python's users as for those of configs and commands."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import benchmarks.__main__ as bench
from causalrn import evaluate, generate, report
from causalrn.models import (
    MLP,
    Alibi,
    HardAlibi,
    LanguageModel,
    LearnedGain,
    LearnedPositions,
    LinearAttention,
    LinearRelation,
    LogLengthGain,
    Nape,
    NoPositions,
    QuadraticRelation,
    RandomPositions,
    Rotary,
    SinusoidalPositions,
    SoftmaxAttention,
    TokenShift,
)
from causalrn.models.decoding import Sampling
from causalrn.system import check_range
from causalrn.training.callbacks import FiniteLoss, Heartbeat, PlainProgress, SampleText
from causalrn.training.module import LanguageModelModule
from causalrn.training.trainer import Trainer
from datamodules.prepare.packing import PackSettings
from datamodules.tasks.copying import CopyDataModule
from datamodules.text import TextDataModule
from launch.job import Job
from tests import ROOT
from tests.test_fit import error_of

NAN = float("nan")


def network(**settings: Any) -> LanguageModel:
    return LanguageModel(
        **{"mixer": LinearRelation(4, 4), "vocab_size": 5, "n_layers": 1, "max_length": 4, **settings}
    )


def module(**settings: Any) -> LanguageModelModule:
    return LanguageModelModule(network(), **settings)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[1, inf)", [1, 1.5, 10**30], [0, -1, NAN, float("inf")]),
        ("(0, inf]", [1e-30, float("inf")], [0, NAN]),
        ("[0, 1)", [0, 0.999], [1, -0.1]),
        ("(0, 1]", [1, 1e-9], [0, 1.1]),
        ("(-inf, inf)", [-3, 0], [float("inf"), float("-inf"), NAN]),
    ],
)
def test_intervals_hold_their_ends_or_do_not(
    interval: str, inside: list[float], outside: list[float]
) -> None:
    check_range(None, interval, value=inside, unused=None, several=[None, *inside])
    for value in outside:
        with pytest.raises(ValueError, match="^value must be .*: got"):
            check_range(None, interval, value=value)
        with pytest.raises(ValueError, match="^value must be .*: got"):
            check_range(None, interval, value=[*inside, value])


@pytest.mark.parametrize(
    ("make", "setting", "wanted"),
    [
        *(
            (module, setting, wanted)
            for setting, wanted in (
                ({"learning_rate": -1e-3}, "at least 0"),
                ({"learning_rate": NAN}, "at least 0"),
                ({"learning_rate": 0.0, "final_learning_rate": 0.1}, "above 0"),
                ({"final_learning_rate": -1e-3}, "at least 0"),
                ({"warmup_steps": -1}, "at least 0"),
                ({"weight_decay": -0.1}, "at least 0"),
                ({"betas": (0.9, 1.0)}, r"in \[0, 1\)"),
                ({"betas": (-0.1, 0.9)}, r"in \[0, 1\)"),
                ({"decay_start": 1.0}, r"in \[0, 1\)"),
            )
        ),
        (network, {"vocab_size": 0}, "at least 1"),
        (network, {"n_layers": 0}, "at least 1"),
        (network, {"max_length": 0}, "at least 1"),
        (network, {"eps": -1e-5}, "at least 0"),
        *(
            (make, setting, wanted)
            for make in (LinearRelation, QuadraticRelation)
            for setting, wanted in (
                ({"d_model": 0, "d_hidden": 4}, "at least 1"),
                ({"d_hidden": -4, "d_model": 4}, "at least 1"),
                ({"n_heads": 0, "d_model": 4, "d_hidden": 4}, "at least 1"),
                ({"eps": -1.0, "d_model": 4, "d_hidden": 4}, "at least 0"),
            )
        ),
        (SoftmaxAttention, {"n_heads": 0, "d_model": 4}, "at least 1"),
        (LinearAttention, {"eps": NAN, "d_model": 4}, "at least 0"),
        (MLP, {"d_hidden": 0, "d_model": 4}, "at least 1"),
        (TokenShift, {"eps": -1.0}, "at least 0"),
        (LearnedPositions, {"max_length": 0, "d_model": 4}, "at least 1"),
        (partial(RandomPositions, NoPositions()), {"max_length": 0}, "at least 1"),
        (SinusoidalPositions, {"longest_wavelength": 0.0}, "above 0"),
        (Rotary, {"longest_wavelength": -1.0}, "above 0"),
        (LearnedGain, {"n_heads": 0}, "at least 1"),
        (LogLengthGain, {"reference": 0.0}, "above 0"),
        (Alibi, {"n_heads": 0}, "at least 1"),
        (Nape, {"n_heads": -1}, "at least 1"),
        (HardAlibi, {"n_windowed": 3, "n_heads": 2}, r"in \[0, 2\]"),
        (FiniteLoss, {"max_skipped": -1}, "at least 0"),
        (FiniteLoss, {"max_loss": 0.0}, "above 0"),
        (FiniteLoss, {"every_n_batches": 0}, "at least 1"),
        (Heartbeat, {"timeout_seconds": NAN}, "above 0"),
        (PlainProgress, {"every_n_seconds": -1.0}, "at least 0"),
        (partial(SampleText, "The "), {"n_tokens": 0}, "at least 1"),
        (partial(SampleText, "The "), {"temperature": -1.0}, "at least 0"),
        (partial(SampleText, "The "), {"top_k": 0}, "at least 1"),
        (Sampling, {"top_p": 0.0}, r"in \(0, 1\]"),
        (Sampling, {"repetition_penalty": 0.0}, "above 0"),
        (CopyDataModule, {"batch_size": 0}, "at least 1"),
        (CopyDataModule, {"num_workers": -1}, "at least 0"),
        (CopyDataModule, {"batches_per_epoch": 0}, "at least 1"),
        (partial(TextDataModule, "shards"), {"context_length": 0}, "at least 1"),
        (partial(PackSettings, {}), {"val_fraction": -0.1}, r"in \[0, 1\)"),
        (Trainer, {"gradient_clip_val": -1}, "at least 0"),
        (Trainer, {"accumulate_grad_batches": 0}, "at least 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_constructors_refuse(make: Callable[..., Any], setting: dict[str, Any], wanted: str) -> None:
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=rf"{name} must be {wanted}: got {re.escape(str(value))}$"):
        make(**setting)


def test_a_job_refuses() -> None:
    with pytest.raises(ValueError, match="^--gpus-per-node must be at least 0: got -1$"):
        Job(gpus_per_node=-1)


def test_what_is_held_out_leaves_something_to_train_on() -> None:
    with pytest.raises(ValueError, match="must be below 1 together: got 0.5 and 0.5"):
        PackSettings({}, val_fraction=0.5, test_fraction=0.5)


def test_a_sample_needs_a_beginning() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        SampleText("")


def test_a_learning_rate_of_0_trains_nothing_where_it_stays() -> None:
    assert module(learning_rate=0.0).learning_rate == 0


@pytest.mark.parametrize(
    ("main", "arguments", "wanted"),
    [
        (evaluate.main, ["--checkpoint", "x", "--batch-size", "0"], "--batch-size must be at least 1: got 0"),
        (
            evaluate.main,
            ["--checkpoint", "x", "--val-samples", "-1"],
            "--val-samples must be at least 1: got -1",
        ),
        (evaluate.main, ["--checkpoint", "x", "--limit", "0"], "--limit must be at least 1: got 0"),
        (
            evaluate.main,
            ["--checkpoint", "x", "--num-fewshot", "-1"],
            "--num-fewshot must be at least 0: got -1",
        ),
        (
            evaluate.main,
            ["--checkpoint", "x", "--max-seconds", "nan"],
            "--max-seconds must be above 0: got nan",
        ),
        (
            generate.main,
            ["--checkpoint", "x", "--temperature", "-1"],
            "--temperature must be at least 0: got -1.0",
        ),
        (generate.main, ["--checkpoint", "x", "--top-p", "1.5"], "--top-p must be in (0, 1]: got 1.5"),
        (generate.main, ["--checkpoint", "x", "--top-k", "0"], "--top-k must be at least 1: got 0"),
        (generate.main, ["--checkpoint", "x", "--samples", "0"], "--samples must be at least 1: got 0"),
        (
            generate.main,
            ["--checkpoint", "x", "--max-tokens", "-1"],
            "--max-tokens must be at least 0: got -1",
        ),
        (
            report.main,
            ["pairs", "--checkpoint", "x", "--prompt", "a", "--max-tokens", "-1"],
            "--max-tokens must be at least 0: got -1",
        ),
        (bench.main, ["step", "--form", "linear", "--steps", "0"], "--steps must be above 0: got 0"),
        (bench.main, ["decode", "--repeats", "-1"], "--repeats must be above 0: got -1"),
        (bench.main, ["metrics", "--threads", "-1"], "--threads must be above 0: got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_refuse_before_they_read_anything(
    main: Callable[[list[str]], Any], arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(main, arguments, capsys) == f"error: {wanted}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["text", "--input", "README.md", "--workers", "0"], "--workers must be at least 1: got 0"),
        (
            ["text", "--input", "README.md", "--val-fraction", "0.6", "--test-fraction", "0.4"],
            "below 1 together",
        ),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if isinstance(value, list) else "",
)
def test_preparation_refuses_before_it_writes(arguments: list[str], wanted: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "datamodules.prepare", *arguments, "--output", str(tmp_path / "shards")]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert wanted in line
    assert not (tmp_path / "shards").exists()
