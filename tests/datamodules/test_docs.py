"""The page on data says what the code does: hashes, presets, commands."""

import re
import shlex

from datamodules.prepare.__main__ import build_parser
from datamodules.prepare.presets import NAMES
from datamodules.tasks.strings import evaluation_sha256
from tests import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()


def test_hashes_of_the_evaluation_sets() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| `(\w+)` \|$", PAGE, re.MULTILINE)
    assert [int(length) for length, _, _ in rows] == [16, 32, 64, 128, 256]
    for length, val, test in rows:
        assert evaluation_sha256("val", int(length), 26, 256) == val
        assert evaluation_sha256("test", int(length), 26, 256) == test


def test_presets_are_listed() -> None:
    assert set(re.findall(r"^\| `([\w-]+)`", PAGE, re.MULTILINE)) == set(NAMES)


def test_commands_parse() -> None:
    lines = re.findall(r"^python -m datamodules.prepare (.*)$", PAGE, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        build_parser().parse_args(shlex.split(line))
