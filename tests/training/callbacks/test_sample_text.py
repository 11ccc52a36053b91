"""SampleText is for text."""

from pathlib import Path

import pytest
import yaml

from causalrn import fit
from tests.test_fit import CONFIG, error_of


def test_a_task_has_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = {"class_path": "causalrn.training.callbacks.SampleText", "init_args": {"prompt": "a"}}
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": [sample]}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    args = ["--config", str(tmp_path / "small.yaml"), "--run_dir", str(tmp_path / "run")]
    assert error_of(fit.main, args, capsys).endswith("want a DataModule of text, got CopyDataModule")
