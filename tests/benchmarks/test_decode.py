"""The decoding benchmark: every figure and target it reports, and its refusal of wrong tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.__main__ as bench
from benchmarks import decode as bench_decode
from benchmarks.targets import at_least, at_most, decode_targets

SMALL = [
    "decode",
    "--d-model",
    "16",
    "--d-hidden",
    "24",
    "--layers",
    "1",
    "--contexts",
    "4",
    "9",
    "--rerun-context",
    "8",
    "--long-tokens",
    "120",
    "--long-d-model",
    "8",
    "--repeats",
    "2",
]


@pytest.mark.slow
# The plain formula that is timed in place of the linear operator has no state to return.
@pytest.mark.usefixtures("unchecked_shapes")
def test_every_figure_is_in_the_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Measuring the memory's speed reads 5 GB.
    monkeypatch.setattr(bench_decode, "measure_read_bandwidth", lambda device: 1e10)
    bench.main([*SMALL, "--output", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "checked: decoding gives the tokens of the whole context"
    record = json.loads(lines[-1])
    names = (bench_decode.LINEAR, bench_decode.QUADRATIC, bench_decode.TRANSFORMER)
    assert [(row["model"], row["context"]) for row in record["steps"]] == [
        (n, t) for n in names for t in (4, 9)
    ]
    quadratic, transformer = record["steps"][3], record["steps"][5]
    # Three products of 16 x 24 (16 x 64 x 3 in the Transformer), two biases, and the head, which has none.
    assert quadratic["weight_bytes"] == 4 * (3 * 16 * 24 + 24 + 16 + 16 * 256)
    assert quadratic["state_bytes"] == 4 * 9 * 24
    assert transformer["state_bytes"] == 4 * 9 * 2 * 16
    streamed = quadratic["weight_bytes"] + quadratic["state_bytes"]
    share = streamed / 1e10 / quadratic["seconds_per_token"]
    assert quadratic["share_of_streaming_limit"] == pytest.approx(share)
    assert set(record["linear_tokens_per_second_by_weights"]) == {"float32", "bfloat16", "int8"}
    assert [row["token"] for row in record["long"]["tokens"]] == [100, 120]
    assert len({row["state_bytes"] for row in record["long"]["tokens"]}) == 1
    targets = record["targets"]
    assert [line.split()[1] for line in lines if line.startswith("target ")] == list(targets)
    assert targets["linear_share_of_streaming_limit"]["value"] == min(
        row["share_of_streaming_limit"] for row in record["steps"][:2]
    )
    assert targets["linear_times_faster_than_transformer"] == {"value": None, "at_least": 1, "met": None}
    (filed,) = tmp_path.glob("*_decode_C16_D24.json")
    assert json.loads(filed.read_text()) == record


def test_targets_compare_contexts_that_both_models_have() -> None:
    def row(model: str, context: int, rate: float) -> dict[str, Any]:
        return {
            "model": model,
            "context": context,
            "tokens_per_second": rate,
            "share_of_streaming_limit": rate / 100,
        }

    record = {
        "steps": [
            *(row("linear", context, 80) for context in (256, 4096, 65536)),
            row("quadratic", 256, 60),
            row("Transformer", 256, 100),
            row("Transformer", 4096, 50),
        ],
        "whole_context_per_token": {name: {"official_ratio": 49.0} for name in ("linear", "quadratic")},
        "long": {"tokens": [{"seconds": 1.0, "resident_bytes": 10}, {"seconds": 1.05, "resident_bytes": 12}]},
    }
    targets = decode_targets(record)
    assert {name: (target["value"], target["met"]) for name, target in targets.items()} == {
        "long_time_ratio": (1.05, True),
        "long_memory_ratio": (1.2, False),
        "linear_share_of_streaming_limit": (0.8, True),
        "quadratic_share_of_streaming_limit": (0.6, False),
        "linear_times_faster_than_whole_context": (49.0, False),
        "quadratic_times_faster_than_whole_context": (49.0, False),
        "linear_times_faster_than_transformer": (1.6, True),
    }
    assert at_least(None, 1)["met"] is at_most(None, 1)["met"] is None


def test_other_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_decode, "generate", lambda *args, **options: torch.zeros(2, 30, dtype=torch.int64)
    )
    with pytest.raises(RuntimeError, match="linear: decoding gives other tokens than the whole context"):
        bench_decode.check()


def test_a_state_larger_than_memory_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_decode, "available_bytes", lambda device: 100)
    options = bench.parse(SMALL)
    network = bench_decode.make_network(bench_decode.QUADRATIC, options)
    assert bench_decode.measure(bench_decode.QUADRATIC, network, 100, 1e10, options) is None
    assert "quadratic at 100: the state takes 9.8 kB, 100 B are free" in capsys.readouterr().out
