"""The page docs/results.md from the records in benchmarks/, whatever each measured: `python -m benchmarks.results`."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from causalrn.cli import Parser
from causalrn.training.errors import run_command

HEADING = """# Results

Written from the records in [benchmarks/]({folder}) by `python -m benchmarks.results`; a test holds that it is up to date.
Ratios compare contenders of one run. Absolute times are those of the machine named, often a shared one.
"""
# Columns of a table: more of them are told in the record alone.
MOST_COLUMNS = 12


def main(args: list[str] | None = None) -> None:
    """Writes the page.

    Raises:
        ValueError: a folder without records, or a file that is none.
    """
    parser = Parser(prog="python -m benchmarks.results", description=__doc__)
    parser.add_argument(
        "--benchmarks", type=Path, default=Path("benchmarks"), help="folder of records (default: benchmarks)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs/results.md"),
        help="Markdown to write (default: docs/results.md)",
    )
    options = parser.parse_args(args)
    page = results_page(options.benchmarks, options.output.parent)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page)
    print(f"written to {options.output}")


def results_page(folder: Path, beside: Path) -> str:
    """The page, with links as they are from the folder `beside`."""
    stems = {path.with_suffix("") for kind in ("*.json", "*.csv") for path in folder.glob(kind)}
    if not stems:
        raise ValueError(f"{folder} holds no records; want JSON files of python -m benchmarks --output")
    link = os.path.relpath(folder, beside)
    ordered = sorted(stems, key=lambda stem: stem.name.partition("_")[2])
    return "\n".join([HEADING.format(folder=link), *(section(stem, link) for stem in ordered)])


def read_record(path: Path) -> dict[str, Any]:
    """What STEM.json holds, or, where it has no rows, with those of STEM.csv."""
    record: Any = {}
    if (file := path.with_name(f"{path.name}.json")).exists():
        try:
            record = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is no record: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{file} is no record: want a JSON object, got {type(record).__name__}")
    if "rows" not in record and (file := path.with_name(f"{path.name}.csv")).exists():
        with file.open(newline="") as lines:
            record["table"] = list(csv.DictReader(lines))
    return record


def section(path: Path, link: str) -> str:
    record = read_record(path)
    date, _, name = path.name.partition("_")
    machine = record.pop("machine", {})
    machine = machine if isinstance(machine, dict) else {"machine": machine}
    lines = [f"## {name.replace('_', ' ')}\n"]
    kind = "json" if path.with_name(f"{path.name}.json").exists() else "csv"
    lines.append(f"{', '.join([date, *hardware(machine)])} ([record]({link}/{path.name}.{kind})).\n")
    if command := machine.get("command"):
        lines.append(f"    {command}\n")
    settings = {key: value for key, value in record.items() if not isinstance(value, dict | list)}
    if settings:
        lines.append(", ".join(f"{words(key)} {number(value)}" for key, value in settings.items()) + ".\n")
    for key, value in record.items():
        if isinstance(value, dict | list) and value:
            lines.append(f"**{words(key)}**\n\n{table(value)}\n")
    if path.with_name(f"{path.name}.png").exists():
        lines.append(f"![{name}]({link}/{path.name}.png)\n")
    return "\n".join(lines)


def hardware(machine: dict[str, Any]) -> list[str]:
    """What of hardware and versions a record tells."""
    told = [machine["gpu"]] if "gpu" in machine else []
    if not told and "cpu" in machine:
        told = [f"{machine['cpu']}, {machine.get('threads', '?')} threads"]
    return told + [f"{name} {machine[name]}" for name in ("torch", "revision") if machine.get(name)]


def table(value: dict[str, Any] | list[Any]) -> str:
    """Rows of a list of records, of a nested dict, or name and value."""
    if isinstance(value, dict):
        if all(isinstance(entry, dict) for entry in value.values()):
            rows = [{"": key, **flatten(entry)} for key, entry in value.items()]
        else:
            rows = [{"": key, "value": entry} for key, entry in flatten(value).items()]
    elif all(isinstance(entry, dict) for entry in value):
        rows = [flatten(entry) for entry in value]
    else:
        rows = [{"value": entry} for entry in value]
    columns = list(dict.fromkeys(key for row in rows for key in row))[:MOST_COLUMNS]
    cells = [[words(column) for column in columns], ["---" for _ in columns]]
    cells += [[number(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= flatten(value, f"{prefix}{key} ") if isinstance(value, dict) else {prefix + key: value}
    return flat


def words(name: str) -> str:
    return name.replace("_", " ")


def number(value: Any) -> str:
    if isinstance(value, float):
        return (
            f"{value:.3g}" if abs(value) < 1e3 else f"{value:.3e}" if abs(value) >= 1e6 else f"{value:,.0f}"
        )
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        # A table in a cell: the record has it.
        return str(len(value))
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    run_command(main)
