"""Writes the README's file map from the first sentence of each file: `python docs/file_map.py`."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- file map: python docs/file_map.py -->\n", "<!-- end of the file map -->\n"
# Folders without Python files, or whose files are alike: one line is enough.
FOLDERS = {
    "causalrn/ops/csrc": "C++ kernels of the CPU, for plain x86 and ARM, AVX2 and AVX-512",
    "configs/copy": "the copying experiment: quickstart, small, the paper's, and far beyond the training length",
    "configs/tasks": "the other synthetic tasks",
    "configs/text": "State of the Union, WikiText-103 small and as in the paper",
    "configs/sweeps": "grids: the paper's tables, and the same in small sizes",
    "configs/mixer": "overlays: another mixer",
    "configs/trainer": "overlays: devices and strategies",
    "configs/logger": "overlays: trackers beside the run folder's own files",
    "docs": "one page for each thing one does, listed below",
    "tests": "a folder for each folder, and a file for each module, of the same name",
}
LONGEST = 100
SOURCES = ("causalrn", "datamodules", "launch", "benchmarks")


def sentence(path: Path) -> str:
    """The first sentence of a file, without the command that it may show."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
    for mark in (": `python", " (`python", ", `python", "; `python"):
        text = text.partition(mark)[0]
    text = text.partition(". ")[0].rstrip(".")
    if len(text) > LONGEST:
        # What follows a colon says more of the same.
        text = re.split("[:;] ", text)[0]
    return text


def lines_of(folder: Path, depth: int) -> list[str]:
    """The folder, its files in the order of their names, then its folders."""
    name = folder.relative_to(ROOT).as_posix()
    start = folder / "__init__.py"
    about = FOLDERS[name] if name in FOLDERS else sentence(start) if start.exists() else ""
    lines = [line(depth, f"{folder.name}/", about)]
    if name in FOLDERS:
        return lines
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            lines.append(line(depth + 1, path.name, sentence(path)))
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        known = path.relative_to(ROOT).as_posix() in FOLDERS
        if known or (path / "__init__.py").exists():
            lines += lines_of(path, depth + 1)
    return lines


def line(depth: int, name: str, about: str) -> str:
    return f"{'  ' * depth + name:<32} {about}".rstrip()


def file_map() -> str:
    """The map as the README shows it."""
    folders = [*SOURCES, "configs", "docs", "tests"]
    lines = [text for name in folders for text in lines_of(ROOT / name, 0)]
    return "\n".join(["```text", *lines, "```"]) + "\n"


def with_map(readme: str) -> str:
    """A README with its map up to date."""
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + file_map() + END + rest.partition(END)[2]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_map(path.read_text()))
