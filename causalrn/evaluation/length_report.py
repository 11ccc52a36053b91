"""The table and the picture of results by length."""

import csv
import statistics
from pathlib import Path
from typing import Any

from causalrn.evaluation.lengths import LengthResult, LengthResults
from causalrn.system import new_figure, replacing

COLUMNS = (
    "step",
    "length",
    "samples",
    "exact_match",
    "character_accuracy",
    "copy_accuracy",
    "loss",
    "first_error",
    "wrong",
    "earliest_error",
    "median_error",
)


def table_rows(
    found: LengthResults, step: int | None = None, context: int | None = None
) -> list[dict[str, Any]]:
    """A row per length; for text also one per bucket of positions, whose `length` is "start-stop".

    `first_error` is the mean number of right tokens before the first mistake, counting whole an answer without one;
    `wrong` is the number of answers with a mistake, and the last two columns tell where their first mistakes are.
    """
    rows = [{"step": step, **result_row(result)} for result in found.results]
    if context:
        rows += [
            {"step": step, "length": f"{start}-{stop}", "loss": loss}
            for start, stop, loss in found.buckets(context)
        ]
    return rows


def result_row(result: LengthResult) -> dict[str, Any]:
    row: dict[str, Any] = {"length": result.length, "samples": result.samples, **result.metrics}
    if "first_error" in result.metrics:
        row["wrong"] = len(result.first_errors)
    if result.first_errors:
        row |= {
            "earliest_error": result.first_errors[0],
            "median_error": statistics.median(result.first_errors),
        }
    return row


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows with the columns that any of them has, in one step."""
    columns = [name for name in COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, with text as values."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw_lengths(
    path: Path, found: LengthResults, trained: tuple[int, int], title: str, context: int | None = None
) -> None:
    """Draws accuracy over length (of text: loss over length and over positions), with the training range shaded.

    Args:
        path: PNG to write.
        found: with at least one length.
        trained: shortest and longest training length.
        title: of the picture.
        context: training context of a text model.
    """
    figure = new_figure(7, 4)
    axis = figure.subplots()
    lengths = [result.length for result in found.results]
    # A single length has no width of its own on the axis.
    axis.axvspan(trained[0] / 1.05, trained[1] * 1.05, color="tab:gray", alpha=0.25, label="training")
    if context:
        axis.plot(
            lengths, [result.metrics["loss"] for result in found.results], marker="o", label="whole blocks"
        )
        buckets = found.buckets(context)
        axis.stairs(
            [loss for _, _, loss in buckets],
            # The axis is logarithmic: what begins at 0 begins at half the context.
            [max(buckets[0][1] / 2, 1), *(stop for _, stop, _ in buckets)],
            color="tab:orange",
            baseline=None,
            label=f"positions of blocks of {lengths[-1]}",
        )
        axis.set(xlabel="length (tokens)", ylabel="loss (nats per token)")
    else:
        for name in ("exact_match", "character_accuracy"):
            values = [result.metrics[name] for result in found.results]
            axis.plot(lengths, values, marker="o", label=name.replace("_", " "))
        axis.set(xlabel="length", ylabel="share", ylim=(-0.03, 1.03))
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    axis.set_title(title)
    figure.savefig(path, dpi=150)
