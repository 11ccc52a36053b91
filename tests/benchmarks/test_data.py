"""The data benchmark: every figure it reports, and its refusal of wrong tokens."""

import json
from pathlib import Path

import pytest
import torch

import benchmarks.__main__ as bench
from benchmarks import data as bench_data
from datamodules.stream import Batch

SMALL = [
    "data",
    "--corpus-mb",
    "8",
    "--text-mb",
    "2",
    "--length",
    "64",
    "--batch-size",
    "4",
    "--batches",
    "5",
]


@pytest.mark.slow
# Forked workers beside threads are what is measured.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_every_figure_is_in_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*SMALL, "--folder", str(tmp_path)])
    *_, last_target, line = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    # Four times the training split of 2 MB.
    assert 7.9e6 < record["corpus_bytes"] <= 8e6
    for figure in (
        "prepare_mb_per_second",
        "first_batch_seconds",
        "resume_seconds",
        "tokens_per_second",
        "memmap_tokens_per_second",
    ):
        assert record[figure] > 0
    assert record["ratio_to_memmap"] == pytest.approx(
        record["memmap_tokens_per_second"] / record["tokens_per_second"]
    )
    assert last_target.startswith("target prepare_mb_per_second")
    assert record["targets"]["million_tokens_per_second"]["value"] == record["tokens_per_second"] / 1e6
    assert record["targets"]["times_slower_than_memmap"]["at_most"] == 2
    assert not list(tmp_path.iterdir())


def test_different_tokens_are_refused() -> None:
    ours: Batch = {"tokens": torch.tensor([1]), "targets": torch.tensor([2])}
    bench_data.check_equal(ours, ours)
    with pytest.raises(RuntimeError, match="the loader and the memory map give different targets"):
        bench_data.check_equal(ours, {**ours, "targets": torch.tensor([3])})
