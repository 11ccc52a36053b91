"""Reading a config does nothing else; flags in either spelling; the console command."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from causalrn import __main__ as console
from causalrn.cli import CLI, Parser, respelled
from tests.test_fit import CONFIG


def test_reading_a_config_touches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    cli = CLI(["--config", "small.yaml", "--run-dir", "run", "--trainer.max-steps=5"])
    assert [path.name for path in tmp_path.rglob("*")] == ["small.yaml"]
    assert (cli.resolved["run_dir"], cli.resolved["trainer"]["max_steps"]) == ("run", 5)
    assert not hasattr(cli, "trainer")


@pytest.mark.slow
def test_default_callbacks_have_flags(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    arguments = ["--config", str(tmp_path / "small.yaml"), "--run_dir", str(tmp_path / "run")]
    with CLI(
        [*arguments, "--heartbeat.timeout_seconds", "600", "--checkpoints.save_top_k", "3"]
    ).open() as cli:
        callbacks = {type(one).__name__: one for one in cli.trainer.callbacks}  # pyright: ignore[reportAttributeAccessIssue]
        assert callbacks["Heartbeat"].timeout_seconds == 600
        assert callbacks["Checkpoints"].save_top_k == 3
    # A config's own takes the place of the default one.
    own = ["--trainer.callbacks+=Heartbeat", "--trainer.callbacks.timeout_seconds=77"]
    with CLI([*arguments, *own]).open() as cli:
        beats = [one for one in cli.trainer.callbacks if type(one).__name__ == "Heartbeat"]  # pyright: ignore[reportAttributeAccessIssue]
        assert [one.timeout_seconds for one in beats] == [77]


def test_flags_are_taken_in_either_spelling() -> None:
    assert respelled(["--a-b", "c-d", "--e-f=g-h", "-x"], "-", "_") == ["--a_b", "c-d", "--e_f=g-h", "-x"]
    parser = Parser()
    parser.add_argument("--max-tokens", type=int)
    assert parser.parse_args(["--max_tokens", "3"]).max_tokens == 3


def test_every_verb_is_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["causalrn"])
    console.main()
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in console.VERBS)
    monkeypatch.setattr(sys, "argv", ["causalrn", "trian"])
    with pytest.raises(SystemExit) as exit_info:
        console.main()
    assert exit_info.value.code == 2
    assert "trian is no verb: want one of fit," in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("verb", console.VERBS)
def test_a_verb_says_how_it_is_used(verb: str) -> None:
    command = [sys.executable, "-m", "causalrn", verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith("usage: ")
