"""Final numbers as a table on the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

DECIMALS = {"loss": 4, "bits_per_byte": 3}


def print_results(results: dict[str, float], baselines: dict[str, float] | None = None) -> None:
    """Prints `val/METRIC` or `val/METRIC/SET` values, one row per validation set, one column per metric; nothing of none.

    Args:
        results: values by logged name.
        baselines: bits per byte of other methods on the same bytes, by name.
    """
    if not results:
        return
    sets: dict[str, dict[str, float]] = {}
    for name, value in results.items():
        metric, _, subset = name.removeprefix("val/").partition("/")
        sets.setdefault(subset or "validation", {})[metric] = value
    columns = sorted({metric for values in sets.values() for metric in values})
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for subset, values in sets.items():
        cells = [
            f"{values[column]:.{DECIMALS.get(column, 3)}f}" if column in values else "" for column in columns
        ]
        table.add_row(subset.replace("_", " "), *cells)
    for name, value in (baselines or {}).items():
        cells = [f"{value:.3f}" if column == "bits_per_byte" else "" for column in columns]
        table.add_row(name.replace("_", " "), *cells)
    Console().print(table)
