"""Every YAML that ships takes a fast step on the CPU."""

from pathlib import Path

import pytest
import yaml

import datamodules.prepare.__main__ as prepare
from causalrn import fit
from tests import ROOT
from tests.ranks import forget_the_last_run

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
COMPLETE = [path for path in CONFIGS if {"model", "data"} <= yaml.safe_load(path.read_text()).keys()]
OVERLAYS = [path for path in CONFIGS if path.parent.name in ("trainer", "mixer", "logger")]
# tests/sweeps/test_points.py reads every point of them.
SWEEPS = [path for path in CONFIGS if path.parent.name == "sweeps"]
# Configs of a corpus that a user brings.
CORPORA = {"wikitext103": "wikitext-103", "wikitext103_small": "wikitext-103"}
FAST = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def prepare_corpus(corpus: str, folder: Path) -> None:
    """Shards of a few kilobytes where the config's first lines put those of the whole corpus."""
    text = (ROOT / "README.md").read_text() * 2
    (folder / "raw").mkdir()
    for split in ("train", "valid", "test"):
        (folder / "raw" / f"wiki.{split}.raw").write_text(text)
    prepare.main(["preset", corpus, "--input", "raw", "--output", f"shards/{corpus}", "--workers", "1"])


def test_every_config_is_known() -> None:
    assert set(CONFIGS) == {*COMPLETE, *OVERLAYS, *SWEEPS}
    assert COMPLETE
    assert OVERLAYS


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPLETE, ids=name)
def test_complete_config_takes_a_step(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Shards and runs are relative to the folder one stands in.
    monkeypatch.chdir(tmp_path)
    if path.stem in CORPORA:
        prepare_corpus(CORPORA[path.stem], tmp_path)
    small = ["--data.init_args.batch_size", "2"]
    fit.main(["--config", str(path), "--run_dir", str(tmp_path / "run"), *FAST, *small])
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
# DeepSpeed's own use of torch.
@pytest.mark.filterwarnings("ignore:`torch.distributed.*is deprecated:FutureWarning")
@pytest.mark.parametrize("path", OVERLAYS, ids=name)
def test_overlay_takes_a_step_over_the_quickstart(path: Path, tmp_path: Path) -> None:
    if path.parent.name == "logger":
        pytest.importorskip(path.stem)
    # What splits a sequence splits the linear relation.
    mixer = "linear_relation" if path.stem == "context_parallel" else ""
    bases = [
        ROOT / "configs" / name for name in ("copy/quickstart.yaml", *([f"mixer/{mixer}.yaml"] * bool(mixer)))
    ]
    base = [part for config in bases for part in ("--config", str(config))]
    # One device, so that no further process is started here: the strategies have tests of their own.
    one = ["--trainer.devices", "1", "--data.init_args.batch_size", "2"]
    if path.stem.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
        forget_the_last_run()
        one += ["--trainer.strategy.class_path", "tests.cpu_deepspeed.CPUZeroStrategy"]
    fit.main([*base, "--config", str(path), "--run_dir", str(tmp_path / "run"), *FAST, *one])
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["strategy"]
    wanted = yaml.safe_load(path.read_text()).get("trainer", {}).get("strategy")
    if isinstance(wanted, dict):
        assert wanted.get("init_args", {}).items() <= resolved["init_args"].items()
    assert (tmp_path / "run" / "results.json").exists()
