"""Text of which nothing is held out is trained on with validation off, and refused with it on."""

import json
from pathlib import Path

import pytest

from causalrn import fit
from causalrn.training.errors import run_command
from datamodules.prepare.__main__ import main as prepare
from tests import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "corpus.txt").write_text("All of it is for training.\n" * 40)
    shards = str(tmp_path / "shards")
    given = ["text", "--input", str(tmp_path / "corpus.txt"), "--output", shards]
    assert prepare([*given, "--val-fraction", "0", "--test-fraction", "0"]) == 0
    return [
        *("--config", str(ROOT / "configs" / "text" / "quickstart.yaml")),
        *("--data.init_args.corpus", "null", "--data.init_args.shards_dir", shards),
        *("--data.init_args.context_length", "16", "--data.init_args.batch_size", "2"),
        # The config's sample is longer than a block of this data.
        *("--model.network.max_length", "64"),
        *("--model.init_args.network.init_args.mixer.init_args.d_model", "8"),
        *("--model.init_args.network.init_args.mixer.init_args.d_hidden", "8"),
        *(
            "--trainer.max_steps",
            "2",
            "--trainer.val_check_interval",
            "1",
            "--trainer.log_every_n_steps",
            "1",
        ),
        *("--trainer.accelerator", "cpu", "--run_dir", str(tmp_path / "run")),
    ]


def test_a_run_without_validation_ends_as_others_do(tmp_path: Path, arguments: list[str]) -> None:
    extrapolation = "--trainer.callbacks+=causalrn.training.callbacks.LengthExtrapolation"
    with pytest.warns(
        UserWarning, match="LengthExtrapolation: there are no samples of length 16: .*val split"
    ):
        fit.main([*arguments, "--trainer.limit_val_batches", "0", extrapolation])
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["step"] == 2
    assert record["metrics"] == {}
    assert "baselines" not in record
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_validation_on_nothing_is_refused_with_the_way_out(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: fit.main(arguments))
    assert exit_info.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the val split has 0 tokens, too few for one block of 16" in error
    assert "limit_val_batches=0 trains without validation" in error
