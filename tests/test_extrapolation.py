"""The extrapolation recipe in small: trained on strings of at most 16 letters, it copies 64."""

from pathlib import Path

import pytest

from benchmarks.extrapolation import measure
from causalrn import fit
from causalrn.training.checkpoint import load_network
from tests import ROOT

RECIPE = ROOT / "configs" / "copy" / "extrapolate.yaml"
NETWORK = "--model.init_args.network.init_args"
MIXER = f"{NETWORK}.mixer.init_args"
CONVOLUTION = f"{NETWORK}.short_convolution.init_args"
# About half a minute on one CPU core.
SMALL = {
    "--trainer.max_steps": "600",
    "--trainer.val_check_interval": "600",
    "--trainer.accelerator": "cpu",
    "--model.init_args.learning_rate": "2e-3",
    f"{CONVOLUTION}.kernel_size": "6",
    f"{CONVOLUTION}.d_model": "128",
    f"{MIXER}.d_model": "128",
    f"{MIXER}.d_hidden": "192",
    # The gain is 1 towards the end of the longest training string.
    f"{MIXER}.gain.init_args.reference": "26",
    "--data.init_args.length": "[8, 16]",
    "--data.init_args.batch_size": "64",
    "--data.init_args.val_lengths": "[16]",
}


@pytest.mark.slow
def test_trained_on_16_letters_it_copies_64(tmp_path: Path) -> None:
    settings = [part for pair in SMALL.items() for part in pair]
    fit.main(["--config", str(RECIPE), "--run_dir", str(tmp_path / "run"), *settings])
    network = load_network(tmp_path / "run" / "checkpoints" / "last.ckpt")
    # All of 64 strings with this seed, and 0.98 of them at 256; learned positions would end at 34 tokens.
    assert measure(network, 64, 64, 2**14)["exact_match"] >= 0.9
