"""Evaluates a checkpoint: `python -m causalrn.evaluate --checkpoint PATH [--lengths 16,32,64 | --tasks NAMES]`."""

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentParser

from causalrn.cli import Parser, quiet_libraries
from causalrn.evaluation.codec import codec_of
from causalrn.evaluation.length_report import draw_ladder, table_rows, write_table
from causalrn.evaluation.lengths import Bounds, climb
from causalrn.evaluation.metrics import is_text
from causalrn.reporting.terminal import print_results
from causalrn.system import check_options, environment, optional_module, write_json
from causalrn.training.callbacks import progress_bar
from causalrn.training.changes import STARTED_IN, check_shards, placed_folders
from causalrn.training.checkpoint import named_checkpoint, network_from, read_checkpoint
from causalrn.training.config_files import find_config, read_config
from causalrn.training.errors import run_command
from causalrn.training.former import upgraded
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
        results = climb_lengths(checkpoint, options, output)
    else:
        results = validate(checkpoint, options)
    print_results(results)
    record = {"checkpoint": str(options.checkpoint), "metrics": results, "environment": environment()}
    write_json(output, record)
    print(f"saved in {output}")


def validate(checkpoint: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """The metrics that training logs, on the validation data."""
    data = make_data(data_config(checkpoint, options))
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


def climb_lengths(checkpoint: dict[str, Any], options: argparse.Namespace, output: Path) -> dict[str, float]:
    """The metrics at each length; leaves a table and a picture beside `output`.

    Raises:
        ValueError: not even the shortest length can be evaluated.
    """
    data: Any = make_data(data_config(checkpoint, options))
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
    ladder = climb(network, data, options.lengths, bounds, device=fabric.device)
    if not ladder.rungs:
        raise ValueError(ladder.ended)
    if ladder.ended:
        print(f"warning: {ladder.ended}", file=sys.stderr)
    table, picture = output.with_suffix(".csv"), output.with_suffix(".png")
    write_table(table, table_rows(ladder, context=context))
    draw_ladder(picture, ladder, data.training_lengths, str(options.checkpoint.name), context)
    print(f"table and picture in {table} and {picture.name}")
    return ladder.metrics(context)


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
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a .ckpt of causalrn.fit or causalrn.export, or a run folder, whose newest one is taken",
    )
    # Without either: the metrics that training logs.
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--lengths",
        type=parse_lengths,
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


def parse_lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"want whole numbers as 16,32,64: got {text!r}") from None
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"want lengths of 1 or more: got {text!r}")
    return lengths


def data_config(checkpoint: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """class_path and init_args of the evaluation data: the checkpoint's or the given config's, with overrides.

    Raises:
        ValueError: neither has any, or the checkpoint's shards are not where it names them.
    """
    if options.data:
        config = upgraded(read_config(options.data))
        origin = str(options.data)
    else:
        config = checkpoint.get("config", {})
        origin = f"checkpoint {options.checkpoint}"
    if not isinstance(config, dict) or "data" not in config:
        raise ValueError(f"{origin} names no data; want --data CONFIG with a data section")
    data = dict(config["data"])
    if not options.data:
        started_in, settings = checkpoint.get(STARTED_IN), data.get("init_args", {})
        data["init_args"] = {**settings, **placed_folders(settings, started_in)}
        check_shards(data["init_args"], started_in, options.checkpoint)
    overrides = {"val_samples": options.val_samples, "batch_size": options.batch_size}
    # At lengths of their own the options bound the ladder instead.
    given = {name: value for name, value in overrides.items() if value is not None and not options.lengths}
    return {**data, "init_args": {**data.get("init_args", {}), **given}}


def make_data(config: dict[str, Any]) -> L.LightningDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    return parser.instantiate_classes(parser.parse_object({"data": config}))["data"]


def default_output(options: argparse.Namespace) -> Path:
    """A JSON file of its own for each kind of evaluation, in the run folder or beside a checkpoint that stands alone."""
    checkpoint = options.checkpoint
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    kind = "-tasks" if options.tasks else "-lengths" if options.lengths else ""
    return folder / f"evaluation-{checkpoint.stem}{kind}.json"


if __name__ == "__main__":
    run_command(main)
