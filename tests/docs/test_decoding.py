"""The page on decoding says what the code does: its commands parse, and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from causalrn import evaluate, export, generate, report
from causalrn.models import LanguageModel, LinearRelation
from causalrn.training.checkpoint import save_network
from tests import ROOT

PAGE = (ROOT / "docs" / "decoding.md").read_text()
PARSERS = {module.__name__: module.make_parser() for module in (evaluate, export, generate, report)}


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^python -m (\S+) (.*)$", PAGE, re.MULTILINE)
    for name in set(re.findall(r"--checkpoint (\S+)", PAGE)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert {name for name, _ in lines} == set(PARSERS)
    for name, arguments in lines:
        PARSERS[name].parse_args(shlex.split(arguments))


def test_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(re.findall(r'load_network\("(.*)"\)', PAGE)[0])
    path.parent.mkdir(parents=True)
    save_network(LanguageModel(LinearRelation(8, 12), 256, n_layers=1, max_length=40), path)
    names: dict = {}
    # The page is ours.
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], names)  # noqa: S102
    assert names["tokens"].shape == (2, 20)
    assert isinstance(names["position"], torch.Tensor)
    assert capsys.readouterr().out.count("tensor(") == 20
