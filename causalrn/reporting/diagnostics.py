"""The report `diagnostics`: probes a checkpoint's relation layers on its validation data, as numbers and as a picture."""

import argparse
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from causalrn.cli import add_checkpoint, whole_numbers
from causalrn.evaluation.diagnostics import Pairs, probe, trained_positions
from causalrn.system import check_options, new_figure, write_json
from causalrn.training.checkpoint import named_checkpoint, network_from, read_checkpoint
from causalrn.training.config_files import find_config
from causalrn.training.data_folders import data_of

# The table has these; the JSON file has every quantile.
COLUMNS = {
    "inverse_std_q50": "1/s median",
    "inverse_std_max": "1/s max",
    "largest_exponent_q50": "exponent median",
    "largest_exponent_max": "exponent max",
    "effective_positions": "effective positions",
    "top_share": "top share",
    "saturation": "saturation",
    "dispersion": "dispersion",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser, "a model of relation mixers")
    parser.add_argument(
        "--data", type=find_config, metavar="CONFIG", help="take the data section of this config"
    )
    parser.add_argument("--lengths", type=whole_numbers, help="string lengths, as 16,32,64 (copying)")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of each set (default: 8)")
    parser.add_argument(
        "--positions", type=int, default=256, help="most receiving positions to look at (default: 256)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("diagnostics.png"), help="PNG to write, with a JSON beside it"
    )


def run(options: argparse.Namespace) -> None:
    """Prints a row per layer and validation set, and writes the picture and the numbers.

    Raises:
        ValueError: a number below 1, another kind of mixer, sequences longer than the model takes, or no data.
    """
    check_options(options, "[1, inf)", "sequences", "positions")
    options.checkpoint = named_checkpoint(options.checkpoint)
    checkpoint = read_checkpoint(options.checkpoint)
    network = network_from(checkpoint, options.checkpoint)
    sets = {}
    for name, batch in first_batches(checkpoint, options).items():
        positions = trained_positions(batch["targets"], options.positions)
        sets[name] = probe(network, batch["tokens"], positions)
    numbers = {name: [pairs.summary() for pairs in layers] for name, layers in sets.items()}
    print_numbers(numbers)
    draw(sets, options.output, options.checkpoint)
    write_json(
        options.output.with_suffix(".json"), {"checkpoint": str(options.checkpoint), "layers": numbers}
    )
    print(f"drawn in {options.output}")


def first_batches(
    checkpoint: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, Int[Tensor, "B T"]]]:
    """The first sequences of each validation set."""
    settings = {"batch_size": options.sequences, "val_lengths": options.lengths}
    data = data_of(checkpoint, options.checkpoint, options.data, settings)
    data.prepare_data()
    data.setup("validate")
    loaders = data.val_dataloader()
    return {
        name: {key: torch.as_tensor(value) for key, value in next(iter(loader)).items()}
        for name, loader in zip(data.val_names, loaders, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    }


def print_numbers(sets: dict[str, list[dict[str, float]]]) -> None:
    shown = {
        key: label
        for key, label in COLUMNS.items()
        if any(key in layer for layers in sets.values() for layer in layers)
    }
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("set")
    table.add_column("layer", justify="right")
    for label in shown.values():
        table.add_column(label, justify="right")
    for name, layers in sets.items():
        for index, layer in enumerate(layers):
            cells = [f"{layer[key]:.3g}" if key in layer else "" for key in shown]
            table.add_row(name.replace("_", " "), str(index), *cells)
    Console(width=140).print(table)


def draw(sets: dict[str, list[Pairs]], path: Path, checkpoint: Path) -> None:
    """One row of panels per validation set: both distributions over the layers, and who contributes over length."""
    # matplotlib is slow to import.
    from matplotlib import colormaps

    figure = new_figure(13, 3.6 * len(sets))
    axes = figure.subplots(len(sets), 3, squeeze=False)
    for (name, layers), row in zip(sets.items(), axes, strict=True):
        draw_distribution(row[0], [pairs.inverse_std for pairs in layers], layers, "1 / s_ij")
        draw_distribution(row[1], [pairs.largest for pairs in layers], layers, "largest exponent")
        bounds = [pairs.bound for pairs in layers if pairs.bound is not None]
        if bounds:
            row[1].axhline(
                bounds[0].max().item(), color="tab:red", linestyle="--", linewidth=1, label="bound"
            )
            row[1].legend(fontsize=7)
        for index, pairs in enumerate(layers):
            row[2].plot(
                pairs.counts().mean(0).cpu(),
                pairs.effective_positions().mean((0, 1)).cpu(),
                label=f"layer {index}",
                color=colormaps["viridis"](index / max(1, len(layers) - 1)),
            )
        counts = layers[0].counts().mean(0).cpu()
        row[2].plot(counts, counts, color="grey", linestyle=":", label="all equal")
        row[2].set(yscale="log", xlabel="positions within reach", ylabel="effective positions")
        row[2].legend(fontsize=7)
        row[0].set_title(name.replace("_", " "), loc="left")
    figure.suptitle(str(checkpoint), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_distribution(axis: Any, values: list[Tensor | None], layers: list[Pairs], label: str) -> None:
    """Bands of quantiles over the layers: 5 to 95 %, the median, and the maximum as points."""
    levels = torch.tensor([0.05, 0.5, 0.95, 1.0])
    rows = [
        value[pairs.reached.expand_as(value)].cpu().sort().values
        for value, pairs in zip(values, layers, strict=True)
        if value is not None
    ]
    axis.set(xlabel="layer", ylabel=label)
    if len(rows) < len(layers):
        axis.text(0.5, 0.5, "q and k are normalised apart", ha="center", transform=axis.transAxes)
        return
    q05, q50, q95, most = torch.stack([row[(levels * (len(row) - 1)).round().long()] for row in rows]).T
    x = range(len(rows))
    axis.vlines(x, q05, q95, linewidth=6, alpha=0.4)
    axis.plot(x, q50, "_", markersize=12, color="black", label="median, 5 to 95 %")
    axis.plot(x, most, "^", markersize=5, label="maximum")
    axis.set_xticks(list(x))
    axis.set_xlim(-0.5, len(rows) - 0.5)
    axis.legend(fontsize=7)
