"""The benchmark command: every figure it reports, its files, and its refusal of wrong results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__ as bench
from benchmarks import common as benchmarking
from benchmarks import quadratic as bench_quadratic

SMALL = ["relation", "--form", "quadratic", "--lengths", "4", "8", "--channels", "6", "--batch-size", "1"]
CPU = torch.device("cpu")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile would take half a minute; what it returns is PyTorch's to test."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_relation_quadratic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*SMALL, "--repeats", "3", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert lines[0].startswith("checked against float64: out ")
    contenders = [
        bench_quadratic.OURS,
        bench_quadratic.EAGER,
        bench_quadratic.COMPILED,
        bench_quadratic.ATTENTION,
    ]
    assert [(row["length"], row["contender"]) for row in record["rows"]] == [
        (t, name) for t in (4, 8) for name in contenders
    ]
    assert all(row["forward_seconds"] > 0 and row["forward_backward_seconds"] > 0 for row in record["rows"])
    ours = record["rows"][4]
    # 36 pairs of 6 channels, each with an exponential per direction.
    assert ours["forward_exp_per_second"] == pytest.approx(36 * 6 / ours["forward_seconds"])
    rate = 2 * 36 * 6 / ours["forward_backward_seconds"]
    assert ours["forward_backward_share_of_exp_limit"] == pytest.approx(rate / record["exp_per_second_limit"])
    faster = record["times_faster"][bench_quadratic.EAGER]["8"]["forward"]
    assert faster == pytest.approx(record["rows"][5]["forward_seconds"] / ours["forward_seconds"])
    assert {"date", "command", "cpu", "threads", "torch", "python"} <= record["machine"].keys()
    (filed,) = tmp_path.glob("*_relation_quadratic_cpu_float32_D6.json")
    assert json.loads(filed.read_text()) == record
    assert filed.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*inputs: Any) -> torch.Tensor:
        return 1.001 * bench_quadratic.relation_quadratic_reference(*inputs)

    monkeypatch.setattr(bench_quadratic, "relation_quadratic", wrong)
    with pytest.raises(RuntimeError, match="out: got a relative error of 1.0e-03, wanted at most 1e-04"):
        bench.main(SMALL)


@pytest.mark.usefixtures("uncompiled")
def test_what_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_quadratic, "available_bytes", lambda device: 4000)
    bench.main([*SMALL, "--repeats", "3"])
    output = capsys.readouterr().out
    record: dict[str, Any] = json.loads(output.splitlines()[-1])
    plain = [row["length"] for row in record["rows"] if row["contender"] == bench_quadratic.EAGER]
    assert plain == [4]
    assert "T 8: the plain formula needs 12.3 kB, 4.0 kB are free" in output


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux")
def test_peak_memory_is_that_of_the_call() -> None:
    def hold() -> None:
        torch.ones(25_000_000)

    hold()
    for _ in range(2):
        assert benchmarking.peak_bytes(hold, CPU) == pytest.approx(100e6, rel=0.05)
    assert benchmarking.peak_bytes(lambda: None, CPU) == pytest.approx(0, abs=2e6)


def test_repeats_end_with_the_budget() -> None:
    calls = []
    benchmarking.median_seconds(lambda: calls.append(1), CPU, repeats=7, budget_seconds=10)
    assert len(calls) == 1 + 7
    calls.clear()
    benchmarking.median_seconds(lambda: calls.append(1), CPU, repeats=7, budget_seconds=0)
    assert len(calls) == 1 + 3


def test_commands_need_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([])
    assert "required: benchmark" in capsys.readouterr().err


@pytest.mark.slow
def test_overhead_ends_in_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["overhead", "--rounds", "1", "--steps", "3", "--batch-size", "2"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(record["seconds_per_step"]) == {"causalrn.fit", "bare loop"}
    assert record["overhead_seconds_per_step"] == pytest.approx(
        record["seconds_per_step"]["causalrn.fit"] - record["seconds_per_step"]["bare loop"]
    )
    assert record["seconds_per_checkpoint"] > 0
