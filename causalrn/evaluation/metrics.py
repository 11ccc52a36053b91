"""Metrics of predicted tokens: copy accuracy as the paper defines it, exact match, first errors, loss, bits per byte."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.stream import IGNORE_INDEX
from datamodules.tasks.strings import EOS


class MeanOverCount(Metric):
    """A ratio of two sums, exact over uneven batches and over ranks; NaN before the first update."""

    full_state_update = False
    higher_is_better: bool | None = True

    def __init__(self) -> None:
        super().__init__()
        # float64: the sums stay exact over more tokens than float32 can count.
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.total: Tensor
        self.count: Tensor

    def add(self, total: Tensor, count: Tensor | int) -> None:
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        return (self.total / self.count).float()


class CharacterAccuracy(MeanOverCount):
    """Share of right tokens among the answers' letters, the closing EOS not counted."""

    def update(self, predictions: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> None:
        letters = answer_letters(targets)
        self.add(((predictions == targets) & letters).sum(), letters.sum())


class CopyAccuracy(MeanOverCount):
    """Mean over strings of the share of right letters, 0 where EOS is not exactly in its place.

    Equals the official `calculate_accuracy_copying`: a string whose last answer token is not predicted as
    EOS, or which has an EOS predicted before that, counts 0. Predictions may come from teacher forcing or
    from decoding.
    """

    def update(self, predictions: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> None:
        letters = answer_letters(targets)
        counted = letters.any(1)
        share = ((predictions == targets) & letters).sum(1) / letters.sum(1).clamp(min=1)
        last = (targets != IGNORE_INDEX) & ~letters
        misplaced = (last & (predictions != targets)).any(1) | (letters & (predictions == EOS)).any(1)
        self.add(share.masked_fill(misplaced | ~counted, 0.0).sum(), counted.sum())


class ExactMatch(MeanOverCount):
    """Share of sequences whose every answer token, EOS included, is right.

    Under teacher forcing this equals the exact match of greedy decoding: as long as no token was wrong, both
    have seen the same tokens.
    """

    def update(self, predictions: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> None:
        # A row without targets fills a rank's batch up and is no sequence.
        counted = (targets != IGNORE_INDEX).any(1)
        right = (predictions == targets) | (targets == IGNORE_INDEX)
        self.add((right.all(1) & counted).sum(), counted.sum())


class MeanLoss(MeanOverCount):
    """Nats per target token."""

    higher_is_better = False

    def update(self, nats: Float[Tensor, ""], n_tokens: Int[Tensor, ""] | int) -> None:
        self.add(nats, n_tokens)


class BitsPerByte(MeanOverCount):
    """Summed nats over counted bytes of text, in bits: comparable between tokenizers.

    Args:
        token_bytes: bytes of text that each token stands for.
    """

    higher_is_better = False

    def __init__(self, token_bytes: Int[Tensor, " V"]) -> None:
        super().__init__()
        self.token_bytes = token_bytes

    def bytes_of(self, targets: Int[Tensor, "B T"]) -> Int[Tensor, ""]:
        """Bytes of text that the targets stand for."""
        return self.token_bytes.to(targets.device)[targets[targets != IGNORE_INDEX]].sum()

    def update(self, nats: Float[Tensor, ""], n_bytes: Int[Tensor, ""] | int) -> None:
        self.add(nats / math.log(2), n_bytes)


class FirstErrors(Metric):
    """The number of right tokens of each answer before its first mistake."""

    full_state_update = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", [], dist_reduce_fx="cat")
        self.add_state("whole", [], dist_reduce_fx="cat")
        self.right: list[Tensor]
        self.whole: list[Tensor]

    def update(self, predictions: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> None:
        answer = targets != IGNORE_INDEX
        wrong = answer & (predictions != targets)
        # Every rank appends at every batch, even if it has no targets, because torchmetrics cannot gather from a rank
        # with an empty state. A row without targets has 0 of 0 tokens right.
        self.right.append((answer & (wrong.cumsum(1) == 0)).sum(1))
        self.whole.append(answer.sum(1))

    def compute(self) -> tuple[Float[Tensor, ""], Int[Tensor, " N"]]:
        """The mean of right tokens before the first mistake (all of an answer without one), and the sorted places of
        the mistakes: 0 is the answer's first token."""
        right, whole = dim_zero_cat(self.right), dim_zero_cat(self.whole)
        return right[whole > 0].double().mean().float(), right[right < whole].sort().values


class PositionLoss(Metric):
    """Nats per token at each position, for sequences of one length.

    Args:
        length: positions of a sequence.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self, length: int) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(length, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(length, dtype=torch.float64), dist_reduce_fx="sum")
        self.nats: Tensor
        self.count: Tensor

    def update(self, nats: Float[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> None:
        self.nats += nats.sum(0)
        self.count += (targets != IGNORE_INDEX).sum(0)

    def compute(self) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"]]:
        """Summed nats and number of targets at each position."""
        return self.nats, self.count


# The metrics of validation, by the last part of the logged name.
TEXT_METRICS = ("loss", "bits_per_byte")
TASK_METRICS: dict[str, type[Metric]] = {
    "loss": MeanLoss,
    "copy_accuracy": CopyAccuracy,
    "exact_match": ExactMatch,
    "character_accuracy": CharacterAccuracy,
}


def is_text(data: Any) -> bool:
    """Whether a DataModule's data is natural text, see `datamodules.base.StreamDataModule`; others are tasks."""
    return getattr(data, "kind", "task") == "text"


def metric_names(data: Any) -> list[str]:
    """The names of the metrics by which a model is validated on a DataModule's data."""
    return list(TEXT_METRICS if is_text(data) else TASK_METRICS)


def validation_metrics(data: Any) -> dict[str, Metric]:
    """The metrics of one validation set of a DataModule, by `metric_names`."""
    if is_text(data):
        return {"loss": MeanLoss(), "bits_per_byte": BitsPerByte(data.token_bytes)}
    return {name: kind() for name, kind in TASK_METRICS.items()}


def answer_letters(targets: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """The answer's tokens without the EOS that closes it; a task of single answers has none."""
    return (targets != IGNORE_INDEX) & (targets != EOS)
