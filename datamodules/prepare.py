"""Command line that prepares shards: `python -m datamodules.prepare {text,preset}`."""

import argparse
import os
import sys
from collections.abc import Sequence

from datamodules.packing import PackSettings
from datamodules.preparation import plan_files, prepare
from datamodules.presets import state_of_the_union
from datamodules.shards import Manifest
from datamodules.tokenizers import ByteTokenizer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m datamodules.prepare", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="shards from .txt, .jsonl(.gz/.zst/.xz), .parquet or .tar files")
    text.add_argument("--input", nargs="+", required=True, help="files and folders")
    text.add_argument("--text-field", default="text", help="JSON key or parquet column (default: text)")
    text.add_argument("--val-fraction", type=float, default=0.05)
    text.add_argument("--test-fraction", type=float, default=0.05)
    text.add_argument("--split-by", choices=["auto", "documents", "position"], default="auto")
    text.add_argument("--seed", type=int, default=0, help="chooses the held-out documents")
    text.add_argument("--on-bad-document", choices=["raise", "skip"], default="raise")
    text.set_defaults(run=_run_text)
    preset = commands.add_parser("preset", help="a standard corpus with its standard split")
    preset.add_argument("name", choices=["state_of_the_union"])
    preset.set_defaults(run=_run_preset)
    for command in (text, preset):
        command.add_argument("--output", required=True, help="folder of the shards")
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
        command.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    return parser


def _run_text(options: argparse.Namespace) -> Manifest:
    settings = PackSettings(
        tokenizer=ByteTokenizer().describe(),
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
        text_field=options.text_field,
        on_bad_document=options.on_bad_document,
    )
    plan = plan_files(options.input, settings, options.split_by)
    return prepare(plan, options.output, workers=options.workers, overwrite=options.overwrite)


def _run_preset(options: argparse.Namespace) -> Manifest:
    return prepare(state_of_the_union(), options.output, workers=options.workers, overwrite=options.overwrite)


def summary(manifest: Manifest) -> str:
    """One line per split, for people."""
    return "\n".join(
        f"{name:<6} {split.documents:>10,} documents {split.text_bytes:>16,} bytes {split.tokens:>16,} tokens "
        f"{len(split.shards):>6} shards"
        for name, split in manifest.splits.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        manifest = options.run(options)
    except (ValueError, OSError) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 1
    print(summary(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
