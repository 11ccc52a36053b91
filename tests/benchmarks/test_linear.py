"""The benchmark of the linear relation: its rates, its record, what it leaves out, and its refusal of wrong results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__ as bench
from benchmarks import linear as bench_linear

SMALL = ["relation", "--form", "linear", "--lengths", "4", "8", "--channels", "6", "--batch-size", "3"]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile would take half a minute; what it returns is PyTorch's to test."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(bench_linear, "COPY_BYTES", 2**16)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_record(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*SMALL, "--dtype", dtype, "--repeats", "3", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    record: dict[str, Any] = json.loads(lines[-1])
    assert lines[0].startswith("checked against float64: y ")
    names = list(bench_linear.contenders())
    assert [(row["length"], row["contender"]) for row in record["rows"]] == [
        (length, name) for length in (4, 8) for name in names
    ]
    ours = record["rows"][len(names)]
    size_bytes = 3 * 8 * 6 * (4 if dtype == "float32" else 2)
    assert ours["forward_bytes_per_second"] == pytest.approx(3 * size_bytes / ours["forward_seconds"])
    share = 8 * size_bytes / ours["forward_backward_seconds"] / record["copy_bytes_per_second"]
    assert ours["forward_backward_share_of_copy_bandwidth"] == pytest.approx(share)
    assert ours["forward_seconds_per_token"] == pytest.approx(ours["forward_seconds"] / 24)
    (filed,) = tmp_path.glob(f"*_relation_linear_cpu_{dtype}_D6.json")
    assert json.loads(filed.read_text()) == record
    assert filed.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_contenders_agree() -> None:
    q, k = torch.randn(2, 2, 20, 1, 8).unbind()
    functions = bench_linear.contenders()
    wanted = functions[bench_linear.OURS](q, k)
    torch.testing.assert_close(functions[bench_linear.EAGER](q, k), wanted, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_what_takes_too_long_or_too_much_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_linear, "LONGEST_CALL_SECONDS", 1e-9)
    # The plain formulas at T = 4 need 4 * 20 * 3 * 4 * 6 bytes.
    monkeypatch.setattr(bench_linear, "available_bytes", lambda device: 5761)
    bench.main([*SMALL, "--repeats", "3"])
    output = capsys.readouterr().out
    record: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert {row["contender"] for row in record["rows"] if row["length"] == 8} == {bench_linear.OURS}
    assert f"T 8: {bench_linear.ATTENTION} would take" in output
    monkeypatch.setattr(bench_linear, "available_bytes", lambda device: 5760)
    bench.main([*SMALL, "--repeats", "3"])
    assert f"T 4: {bench_linear.EAGER} needs 5.8 kB, 5.8 kB are free" in capsys.readouterr().out


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **settings: Any) -> Any:
        y, state = bench_linear.relation_linear_reference(*arguments, **settings)
        return 1.001 * y, state

    monkeypatch.setattr(bench_linear, "relation_linear", wrong)
    with pytest.raises(RuntimeError, match="y: got a relative error of 1.0e-03, wanted at most 1e-04"):
        bench.main(SMALL)
