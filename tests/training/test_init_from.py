"""A new run that begins with the weights of another one: what it takes from there, and how it is started again."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from causalrn import fit
from causalrn.sweeps.folder import SweepFolder
from causalrn.sweeps.grid import read_sweep
from causalrn.sweeps.points import plan_points
from causalrn.training.checkpoint import load_network, read_checkpoint, save_network
from causalrn.training.errors import run_command
from causalrn.training.loggers import read_metrics
from tests.faults import FAULT, write_config
from tests.test_fit import CONFIG, error_of
from tests.training.test_preemption import assert_same
from tests.training.test_resume import contents, last, steps


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "config.yaml", module="NoisyCopyModule", strategy="auto", devices=1, max_steps=3
    )


@pytest.fixture
def source(tmp_path: Path, config: Path) -> Path:
    fit.main(["--config", str(config), "--run_dir", str(tmp_path / "source")])
    return tmp_path / "source"


@pytest.mark.slow
def test_it_takes_the_weights_and_nothing_else(
    tmp_path: Path, config: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(source)
    weights = tmp_path / "weights.ckpt"
    save_network(load_network(source / "checkpoints" / "last.ckpt"), weights)
    # Other data and another schedule; at this rate nothing moves.
    other = ["--data.init_args.length", "6", "--data.init_args.seed", "3", "--trainer.max_steps", "2"]
    still = ["--model.init_args.learning_rate", "0", "--model.init_args.warmup_steps", "0"]
    for number, path in enumerate((source, source / "checkpoints" / "last.ckpt", weights)):
        run_dir = tmp_path / f"new{number}"
        args = ["--config", str(config), "--init_from", str(path), "--run_dir", str(run_dir), *other, *still]
        capsys.readouterr()
        fit.main(args)
        assert f"begins with the weights of {source if not number else path}" in capsys.readouterr().out
        new = last(run_dir)
        assert_same(new["state_dict"], last(source)["state_dict"], "state_dict")
        assert new["global_step"] == 2
        assert {float(state["step"]) for state in new["optimizer_states"][0]["state"].values()} == {2.0}
        assert steps(run_dir)[0] == 0
        assert json.loads((run_dir / "origin.json").read_text()) == {"init_from": str(path)}
    assert contents(source) == before
    # Its config begins a run with fresh weights.
    kept = tmp_path / "new0" / "config.yaml"
    assert yaml.safe_load(kept.read_text())["init_from"] is None
    fit.main(["--config", str(kept), "--run_dir", str(tmp_path / "fresh")])
    fresh = last(tmp_path / "fresh")["state_dict"]
    assert any(not torch.equal(fresh[name], value) for name, value in last(source)["state_dict"].items())


@pytest.mark.slow
def test_started_again_it_continues_its_own_run(
    tmp_path: Path,
    config: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["--config", str(config), "--init_from", str(source), "--trainer.max_steps", "4", "--run_dir"]
    fit.main([*command, str(whole)])
    monkeypatch.setenv(FAULT, '{"kind": "SIGTERM", "rank": 0, "step": 1}')
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: fit.main([*command, str(broken)]))
    assert stop.value.code == 75
    monkeypatch.delenv(FAULT)
    capsys.readouterr()
    fit.main([*command, str(broken)])
    assert "step=2.ckpt, step 2" in capsys.readouterr().out
    assert_same(last(whole)["state_dict"], last(broken)["state_dict"], "state_dict")
    assert read_metrics(whole / "metrics.csv")[-1] == read_metrics(broken / "metrics.csv")[-1]
    # Requeued before its first checkpoint, it begins with the weights again.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    fit.main([*command, str(tmp_path / "requeued")])
    assert_same(last(whole)["state_dict"], last(tmp_path / "requeued")["state_dict"], "state_dict")
    # Not its weights are asked for then, but the run that it has become.
    fit.main([*command, str(broken), "--trainer.max_steps", "5"])
    assert read_checkpoint(broken / "checkpoints" / "last.ckpt")["global_step"] == 5


@pytest.mark.slow
def test_wrong_networks_are_named(
    tmp_path: Path, config: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = "--model.init_args.network.init_args"
    mixer = CONFIG["model"]["init_args"]["network"]["init_args"]["mixer"]["class_path"]
    command = ["--config", str(config), "--init_from", str(source), "--run_dir", str(tmp_path / "new")]
    capsys.readouterr()
    for arguments, wanted in (
        ([f"{network}.n_layers", "2"], "n_layers was 1 and is 2"),
        ([f"{network}.mixer.init_args.d_hidden", "32"], "mixer.d_hidden was 16 and is 32"),
        ([f"{network}.mixer", mixer.replace("Quadratic", "Linear")], "mixer.class was 'QuadraticRelation'"),
    ):
        assert wanted in error_of(fit.main, [*command, *arguments], capsys)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"half")
    for path, wanted in ((broken, "truncated"), (tmp_path / "none", "--init_from .*none: no checkpoint")):
        command[command.index("--init_from") + 1] = str(path)
        with pytest.raises((ValueError, OSError), match=wanted):
            fit.main(command)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_sweep_passes_it_on(tmp_path: Path, config: Path, source: Path) -> None:
    plan = {
        "configs": [str(config)],
        "set": {"init_from": str(source), "trainer.max_steps": 2},
        "grid": {"model.init_args.learning_rate": [0.0]},
        "output": str(tmp_path / "sweep"),
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plan))
    sweep = read_sweep(tmp_path / "sweep.yaml")
    (point,), (planned,) = sweep.points, plan_points(sweep)
    # Unlike the run folder it belongs to the point: with other weights it would be another one.
    assert planned.settings["init_from"] == str(source)
    folder = SweepFolder(sweep.output)
    folder.prepare()
    fit.main(folder.arguments(point))
    assert_same(last(folder.run_dir(point))["state_dict"], last(source)["state_dict"], "state_dict")
    assert folder.state(point) == "finished"
    fit.main(folder.arguments(point))
    assert last(folder.run_dir(point))["global_step"] == 2
