"""Every command that the README shows is run, in its order, in a folder of its own."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests import ROOT
from tests.commands import exit_code
from tests.interop.official_reference import make_state_dict

README = (ROOT / "README.md").read_text()
# What would train for minutes is cut short here; everything else runs as it stands.
SHORTENED = {
    "configs/text/quickstart.yaml": ["--trainer.max_steps", "60", "--trainer.limit_val_batches", "4"],
    "configs/copy/extrapolate.yaml": ["--trainer.max_steps", "5", "--trainer.limit_val_batches", "1"],
    "64,512,2048": ["--max-seconds", "1"],
}


def shell_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_make_targets_and_their_spelled_out_commands_agree() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "\n".join(shell_lines()), re.MULTILINE)
    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for line in shell_lines():
        if line.startswith((".venv/bin/pip", ".venv/bin/python -m pytest")):
            recipe = line.replace(".venv/bin", "$(BIN)")
            plain = makefile.replace(" --quiet --disable-pip-version-check", "")
            assert recipe in plain, line


def test_the_file_map_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "file_map.py"))
    assert script["with_map"](README) == README, "python docs/file_map.py"


@pytest.mark.slow
# A resumed run knows its folder by the absolute path.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "README.md").write_text(README)
    torch.save(make_state_dict("relation"), tmp_path / "weights.pth")
    commands = [line for line in shell_lines() if line.startswith("python -m")]
    assert len(commands) >= 5
    for line in commands:
        _, _, module, *arguments = shlex.split(line)
        for name, extra in SHORTENED.items():
            arguments += extra if name in arguments else []
        with mock.patch.object(sys, "argv", [module, *arguments]):
            assert not exit_code(module, arguments), line
        printed = capsys.readouterr().out
        if "configs/copy/quickstart.yaml" in line and "max_steps" not in line:
            assert re.search(r"validation +1\.000 +1\.000 +1\.000", printed), printed[-2000:]
