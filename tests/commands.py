"""The commands and Python blocks of a Markdown page, run in this process: starting one for each would cost most of the time."""

import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

from tests import ROOT

# Trainings are cut short; everything else runs as it stands.
FAST = {"max_steps": "2", "limit_val_batches": "1", "val_check_interval": "1", "log_every_n_steps": "1"}


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, also of those inside lists."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```", page, re.DOTALL | re.MULTILINE)
    return [(kind, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)) for indent, kind, text in found]


def shell_lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run_page(page: str) -> int:
    """Runs a page from top to bottom in the current folder; returns the number of commands.

    A Python block whose first line is `# NAME.py` becomes that file; others run.
    """
    count = 0
    for kind, text in blocks(page):
        if kind == "sh":
            for line in shell_lines(text):
                run_line(line)
                count += 1
        elif kind == "python":
            if name := re.match(r"# (\w+\.py)\n", text):
                Path(name[1]).write_text(text)
            else:
                exec(compile(text, "page", "exec"), {})  # noqa: S102
    return count


def run_line(line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "python", line
    module, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if module == "causalrn.fit":
        fast = dict(FAST)
        if "--resume" in arguments:
            # Beyond the steps that were taken.
            fast["max_steps"] = "3"
        arguments += [part for name, value in fast.items() for part in (f"--trainer.{name}", value)]
    with mock.patch.object(sys, "argv", [module, *arguments]):
        # Anything but None and 0 is a failure.
        assert not exit_code(module, arguments), line


def exit_code(module: str, arguments: list[str]) -> int | str | None:
    try:
        if module.endswith(".py"):
            runpy.run_path(str(ROOT / module), run_name="__main__")
            return 0
        found = importlib.import_module(module)
        if hasattr(found, "__path__"):
            found = importlib.import_module(f"{module}.__main__")
        return found.main(arguments)
    except SystemExit as stop:
        return stop.code
