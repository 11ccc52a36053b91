"""The benchmark of what metrics cost: its figures and its record."""

import json
from pathlib import Path

import pytest
import yaml

import benchmarks.__main__ as bench
from causalrn.training.callbacks import Norms, Throughput
from tests.test_fit import CONFIG


@pytest.mark.slow
def test_the_share_of_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Throughput.on_train_batch_end, Norms.on_train_batch_end
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    size = ["--steps", "3", "--batch-size", "2"]
    bench.main(["metrics", "--config", str(tmp_path / "small.yaml"), *size, "--output", str(tmp_path)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    spent = record["cpu_seconds"]
    assert 0 < spent["metrics"] < spent["training loop"]
    assert record["metrics_share"] == spent["metrics"] / spent["training loop"]
    (filed,) = tmp_path.glob("*_metrics_small.json")
    assert json.loads(filed.read_text()) == record
    assert before == (Throughput.on_train_batch_end, Norms.on_train_batch_end)
