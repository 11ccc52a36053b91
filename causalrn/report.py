"""Shows runs as a page, `python -m causalrn.report RUNS...`, and the inside of models, `... report pairs|diagnostics`."""

import argparse
import sys
from pathlib import Path

import torch

from causalrn.cli import Parser, add_checkpoint, quiet_libraries
from causalrn.evaluation.codec import Codec, codec_of
from causalrn.evaluation.pairs import describe_row, draw_pairs, pair_norms
from causalrn.models import LanguageModel
from causalrn.models.decoding import GREEDY, check_prompts, generate
from causalrn.reporting import diagnostics, page
from causalrn.system import check_options, write_json
from causalrn.training.checkpoint import named_checkpoint, network_from, read_checkpoint
from causalrn.training.errors import run_command

VERBS = ("pairs", "diagnostics")


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    # A folder of the name of a verb is given as ./pairs.
    parser = make_parser() if args and args[0] in VERBS else make_runs_parser()
    options = parser.parse_args(args)
    quiet_libraries()
    options.run(options)


def make_runs_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m causalrn.report",
        description=__doc__,
        epilog=f"Other reports: {', '.join(VERBS)} --help",
    )
    page.add_arguments(parser)
    parser.set_defaults(run=page.run)
    return parser


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m causalrn.report", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    pairs = verbs.add_parser("pairs", help="heat map: how much each position contributes to each later one")
    add_checkpoint(pairs, "a model of relation mixers")
    pairs.add_argument(
        "--prompt", required=True, help="text, or letters of the copy task; the answer is added to it"
    )
    pairs.add_argument(
        "--max-tokens", type=int, help="length of the answer (default: until it ends; text: 0)"
    )
    pairs.add_argument("--layer", type=int, default=-1, help="layer to look at; -1 is the last one (default)")
    pairs.add_argument(
        "--position", type=int, default=-1, help="position to draw apart; -1 is the last one (default)"
    )
    pairs.add_argument("--head", type=int, default=0, help="head to look at (default: 0)")
    pairs.add_argument(
        "--output", type=Path, help="PNG to write, with a JSON beside it (default: pairs-layerN.png)"
    )
    pairs.set_defaults(run=report_pairs)
    inside = verbs.add_parser("diagnostics", help="what every layer's pairs look like on the validation data")
    diagnostics.add_arguments(inside)
    inside.set_defaults(run=diagnostics.run)
    return parser


def report_pairs(options: argparse.Namespace) -> None:
    """Writes the picture and the numbers, and names the positions that contribute most.

    Raises:
        ValueError: no such layer, head or position, another kind of mixer, or a prompt that the model cannot read.
    """
    check_options(options, "[0, inf)", "max_tokens", "head")
    options.checkpoint = named_checkpoint(options.checkpoint)
    checkpoint = read_checkpoint(options.checkpoint)
    network = network_from(checkpoint, options.checkpoint)
    codec = codec_of(checkpoint)
    tokens = read_and_answer(network, codec, options.prompt, options.max_tokens)
    norms = pair_norms(network, tokens, options.layer)
    layer = options.layer % network.n_layers
    if not 0 <= options.head < len(norms):
        raise ValueError(f"head must be in [0, {len(norms)}): got {options.head}")
    if not -len(tokens) <= options.position < len(tokens):
        raise ValueError(f"position must be in [{-len(tokens)}, {len(tokens)}): got {options.position}")
    position = options.position % len(tokens)
    names = [token_name(codec, token) for token in tokens.tolist()]
    output = options.output or Path(f"pairs-layer{layer}.png")
    title = f"{options.checkpoint.name}, layer {layer}, head {options.head}"
    draw_pairs(norms[options.head], names, position, title, output)
    record = {"layer": layer, "head": options.head, **describe_row(norms[options.head], names, position)}
    write_json(output.with_suffix(".json"), record)
    row = norms[options.head, position, : position + 1]
    best = row.topk(min(3, len(row)))
    shown = ", ".join(
        f"{j} {names[j]!r} ({value:.3g})" for value, j in zip(*(t.tolist() for t in best), strict=True)
    )
    print(f"position {position} {names[position]!r} takes most from {shown}; drawn in {output}")


def read_and_answer(
    network: LanguageModel, codec: Codec, prompt: str, max_tokens: int | None
) -> torch.Tensor:
    """The tokens of the prompt and of the model's greedy answer, but for its last token, which it does not read."""
    tokens = torch.tensor(codec.encode(prompt), dtype=torch.int64)
    check_prompts([tokens], network)
    if max_tokens is None and codec.default_temperature > 0:
        max_tokens = 0
    answer = generate(network, [tokens], max_tokens, GREEDY, stop_tokens=codec.stop_tokens)[0]
    return torch.cat([tokens, answer[:-1]])


def token_name(codec: Codec, token: int) -> str:
    """A token as it is labelled: visible, and never empty."""
    text = codec.decode([token])
    return text.strip() or (repr(text) if text else f"<{token}>")


if __name__ == "__main__":
    run_command(main)
