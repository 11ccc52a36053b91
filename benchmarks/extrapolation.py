"""Copying far beyond the training length: exact match per length, and what stands before the first mistakes."""

import argparse
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Lines
from causalrn.cli import whole_numbers
from causalrn.models import LanguageModel
from causalrn.models.decoding import GREEDY, generate
from causalrn.training.checkpoint import named_checkpoint, network_from, read_checkpoint
from datamodules.tasks.strings import EOS, FIRST_LETTER, evaluation_rows

# Strings of the shortest length that are also decoded token by token, to hold the shortcut against.
DECODED_STRINGS = 4
# Mistakes that a record tells of each length.
EXPLAINED_MISTAKES = 20


class Mistake(NamedTuple):
    """The first mistake in a string.

    Attributes:
        position: letters that were right before it.
        context: letters before it that stand elsewhere too, followed by the letter that was taken instead: a context
            longer than the model compares is one it cannot tell apart.
        repeated: letters before it that stand elsewhere at all.
    """

    position: int
    context: int
    repeated: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=named_checkpoint,
        nargs="+",
        required=True,
        help="one or more, or run folders, as of several seeds",
    )
    parser.add_argument("--name", default="copy", help="names the record (default: copy)")
    parser.add_argument("--lengths", type=whole_numbers, default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument(
        "--samples",
        type=whole_numbers,
        default=[64],
        help="strings of each length, the last for all further ones",
    )
    parser.add_argument(
        "--positions",
        type=int,
        default=16384,
        help="of a batch: how many strings run at a time (default: 16384)",
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """The record of all checkpoints, and the panels of its plot."""
    samples = options.samples + options.samples[-1:] * len(options.lengths)
    rows: list[dict[str, Any]] = []
    for path in options.checkpoint:
        checkpoint = read_checkpoint(path)
        network = network_from(checkpoint, path)
        check(network, min(options.lengths))
        # The folder's name tells runs apart, without saying where they lie.
        name = path.parent.parent.name if path.parent.name == "checkpoints" else path.stem
        for length, count in zip(options.lengths, samples, strict=False):
            row = measure(network, length, count, options.positions)
            rows.append({"checkpoint": name, **row})
            print(
                f"{name:<20} length {length:<6} exact match {row['exact_match']:.3f} of {count}, "
                f"characters {row['character_accuracy']:.5f}, {row['seconds_per_string']:.2f} s a string",
                flush=True,
            )
    summary = summarise(rows)
    for line in summary:
        print(
            f"length {line['length']:<6} mean {line['mean_exact_match']:.4f}, worst {line['worst_exact_match']:.4f} "
            f"of {line['checkpoints']} checkpoints",
            flush=True,
        )
    record = {"benchmark": "extrapolation", "decoding": "greedy", "summary": summary, "rows": rows}
    return record, panels(rows)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exact match per length over the checkpoints: its mean, and the worst of them."""
    summary = []
    for length in dict.fromkeys(row["length"] for row in rows):
        found = [row["exact_match"] for row in rows if row["length"] == length]
        mean, worst = sum(found) / len(found), min(found)
        summary.append(
            {
                "length": length,
                "checkpoints": len(found),
                "mean_exact_match": mean,
                "worst_exact_match": worst,
            }
        )
    return summary


def panels(rows: list[dict[str, Any]]) -> dict[str, Lines]:
    """Accuracy over length, one line per checkpoint."""
    drawn: dict[str, Lines] = {}
    for label in ("exact_match", "character_accuracy"):
        lines: Lines = {}
        for name in dict.fromkeys(row["checkpoint"] for row in rows):
            mine = [row for row in rows if row["checkpoint"] == name]
            lines[name] = ([row["length"] for row in mine], [row[label] for row in mine])
        drawn[label.replace("_", " ")] = lines
    return drawn


def check(network: LanguageModel, length: int) -> None:
    """Holds the whole answer's most likely tokens against decoding: both are right for the same strings.

    Up to its first mistake a greedily decoded answer has the right answer's tokens before it, so that one parallel
    pass over the right answer finds the same first mistake.

    Raises:
        RuntimeError: they differ.
    """
    tokens = letters_of(network, length, 0, DECODED_STRINGS)
    right, _ = predict(network, tokens)
    answers = generate(network, tokens[:, : length + 2], length + 1, GREEDY)
    decoded = answers == wanted(tokens)
    first = [row.long().argmin().item() if not row.all() else -1 for row in (*right, *decoded)]
    if first[: len(right)] != first[len(right) :]:
        raise RuntimeError("decoding makes other first mistakes than one pass over the answer")


@torch.inference_mode()
def measure(network: LanguageModel, length: int, count: int, batch_positions: int) -> dict[str, Any]:
    """Metrics of `count` strings of the validation set of one length."""
    batch = max(1, batch_positions // (2 * length + 2))
    right_letters, wrong_strings = 0, 0
    mistakes: list[Mistake] = []
    start = time.perf_counter()
    for first in range(0, count, batch):
        tokens = letters_of(network, length, first, min(batch, count - first))
        right, predicted = predict(network, tokens)
        right_letters += int(right.sum())
        for row, guesses, letters in zip(right, predicted, wanted(tokens), strict=True):
            if row.all():
                continue
            wrong_strings += 1
            if len(mistakes) < EXPLAINED_MISTAKES:
                mistakes.append(explain(letters.numpy(), guesses.numpy(), int(row.long().argmin())))
    return {
        "length": length,
        "strings": count,
        "exact_match": 1 - wrong_strings / count,
        "character_accuracy": right_letters / (count * (length + 1)),
        "first_mistakes": [mistake._asdict() for mistake in mistakes],
        "seconds_per_string": (time.perf_counter() - start) / count,
    }


def letters_of(network: LanguageModel, length: int, first: int, count: int) -> Tensor:
    ids = np.arange(first, first + count)
    rows = evaluation_rows("val", length, network.vocab_size - FIRST_LETTER, ids)
    return torch.from_numpy(rows["tokens"]).long()


def wanted(tokens: Tensor) -> Tensor:
    """The answers of rows `BOS s SEP s`: s, then EOS."""
    length = tokens.shape[1] // 2 - 1
    return torch.cat([tokens[:, length + 2 :], torch.full_like(tokens[:, :1], EOS)], 1)


@torch.inference_mode()
def predict(network: LanguageModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of the answers are right, and the most likely ones, given the right ones before them."""
    state = network.init_cache(len(tokens), capacity=tokens.shape[1])
    x, _ = network.advance(tokens, state)
    predicted = network.unembed(x[:, tokens.shape[1] // 2 :]).argmax(-1)
    return predicted == wanted(tokens), predicted


def explain(letters: np.ndarray, guesses: np.ndarray, position: int) -> Mistake:
    """What stands before the first mistake, compared with every other place of the string."""
    best = repeated = 0
    for other in range(1, len(letters)):
        if other == position:
            continue
        length = 0
        while length < min(position, other) and letters[position - 1 - length] == letters[other - 1 - length]:
            length += 1
        repeated = max(repeated, length)
        if letters[other] == guesses[position]:
            best = max(best, length)
    return Mistake(position, best, repeated)
