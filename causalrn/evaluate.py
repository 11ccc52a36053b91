"""Evaluates a checkpoint: `python -m causalrn.evaluate --checkpoint PATH [--lengths 16,32,64 | --tasks NAMES]`."""

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from causalrn.cli import Parser, add_checkpoint, quiet_libraries, whole_numbers
from causalrn.evaluation.codec import codec_of
from causalrn.evaluation.length_report import draw_lengths, table_rows, write_table
from causalrn.evaluation.lengths import Bounds, evaluate_lengths
from causalrn.evaluation.metrics import is_text
from causalrn.reporting.terminal import print_results
from causalrn.system import check_options, environment, optional_module, write_json
from causalrn.training.callbacks import progress_bar
from causalrn.training.checkpoint import named_checkpoint, network_from, read_checkpoint
from causalrn.training.config_files import find_config
from causalrn.training.data_folders import data_of
from causalrn.training.errors import run_command
from causalrn.training.module import LanguageModelModule


def main(args: list[str] | None = None) -> None:
    options = make_parser().parse_args(args)
    check_options(options, "[1, inf)", "val_samples", "tokens_per_batch", "limit", "batch_size")
    check_options(options, "[0, inf)", "num_fewshot")
    check_options(options, "(0, inf]", "max_seconds")
    options.checkpoint = named_checkpoint(options.checkpoint)
    quiet_libraries()
    checkpoint = read_checkpoint(options.checkpoint)
    output = options.output or default_output(options)
    if options.tasks:
        results = run_tasks(checkpoint, options)
    elif options.lengths:
        results = measure_lengths(checkpoint, options, output)
    else:
        results = validate(checkpoint, options)
    print_results(results)
    record = {"checkpoint": str(options.checkpoint), "metrics": results, "environment": environment()}
    write_json(output, record)
    print(f"saved in {output}")


def validate(checkpoint: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """The metrics that training logs, on the validation data."""
    settings = {"val_samples": options.val_samples, "batch_size": options.batch_size}
    data = data_of(checkpoint, options.checkpoint, options.data, settings)
    network = network_from(checkpoint, options.checkpoint)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[progress_bar()],
    )
    warnings.filterwarnings("ignore", ".*No logger.*")
    trainer.validate(LanguageModelModule(network), data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def measure_lengths(
    checkpoint: dict[str, Any], options: argparse.Namespace, output: Path
) -> dict[str, float]:
    """The metrics at each length; leaves a table and a picture beside `output`.

    Raises:
        ValueError: not even the shortest length can be evaluated.
    """
    # The options bound the evaluation here; the data keep their own settings.
    data: Any = data_of(checkpoint, options.checkpoint, options.data)
    data.prepare_data()
    data.setup("validate")
    context = data.training_lengths[1] if is_text(data) else None
    fabric = L.Fabric(accelerator=options.accelerator, devices=1, precision=options.precision)
    # Runs the forward pass in the wanted precision.
    network = fabric.setup_module(network_from(checkpoint, options.checkpoint)).eval()
    samples, rows = options.val_samples, options.batch_size
    bounds = Bounds(
        samples=getattr(data, "val_samples", Bounds.samples) if samples is None else samples,
        tokens_per_batch=options.tokens_per_batch,
        rows_per_batch=Bounds.rows_per_batch if rows is None else rows,
        max_seconds=options.max_seconds,
    )
    found = evaluate_lengths(network, data, options.lengths, bounds, device=fabric.device)
    if not found.results:
        raise ValueError(found.ended)
    if found.ended:
        print(f"warning: {found.ended}", file=sys.stderr)
    table, picture = output.with_suffix(".csv"), output.with_suffix(".png")
    write_table(table, table_rows(found, context=context))
    draw_lengths(picture, found, data.training_lengths, str(options.checkpoint.name), context)
    print(f"table and picture in {table} and {picture.name}")
    return found.metrics(context)


def run_tasks(checkpoint: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """The metrics of lm-evaluation-harness."""
    optional_module("lm_eval", "harness", "--tasks")
    # Needs lm_eval, which is optional.
    from causalrn.interop.lm_eval import evaluate_tasks

    network = network_from(checkpoint, options.checkpoint)
    device = "cuda" if options.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available() else "cpu"
    return evaluate_tasks(
        network.to(device),
        codec_of(checkpoint),
        options.tasks.split(","),
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size or 16,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m causalrn.evaluate", description=__doc__)
    add_checkpoint(parser)
    # Neither of the two gives the metrics that training logs.
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--lengths",
        type=whole_numbers,
        help="lengths of strings, or of blocks of text, as 64,128,256; ends at the first that the model cannot run",
    )
    parser.add_argument(
        "--data", type=find_config, metavar="CONFIG", help="take the data section of this config"
    )
    parser.add_argument("--val-samples", type=int, help="strings per length, or blocks of text (--lengths)")
    parser.add_argument(
        "--tokens-per-batch",
        type=int,
        default=Bounds.tokens_per_batch,
        help="batches shrink with length to it",
    )
    parser.add_argument(
        "--max-seconds", type=float, default=math.inf, help="ends before further lengths (--lengths)"
    )
    kind.add_argument(
        "--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, as lambada_openai,piqa"
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="FOLDER", help="further tasks: YAML files (--tasks)"
    )
    parser.add_argument("--num-fewshot", type=int, help="examples in each context (--tasks)")
    parser.add_argument("--limit", type=int, help="samples of each task (--tasks)")
    parser.add_argument("--batch-size", type=int, help="sequences per step")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file of results (default: evaluation-NAME.json, -lengths or -tasks, in the run folder)",
    )
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, ... (default: auto)")
    parser.add_argument("--precision", default="32-true", help="as in Lightning's Trainer (default: 32-true)")
    return parser


def default_output(options: argparse.Namespace) -> Path:
    """A JSON file of its own for each kind of evaluation, in the run folder or beside a checkpoint that stands alone."""
    checkpoint = options.checkpoint
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    kind = "-tasks" if options.tasks else "-lengths" if options.lengths else ""
    return folder / f"evaluation-{checkpoint.stem}{kind}.json"


if __name__ == "__main__":
    run_command(main)
