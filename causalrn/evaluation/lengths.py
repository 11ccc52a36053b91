"""How well a network does at lengths far beyond those of training, within bounds of memory and time."""

import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import Metric

from causalrn.evaluation.metrics import (
    IGNORE_INDEX,
    FirstErrors,
    MeanLoss,
    PositionLoss,
    is_text,
    validation_metrics,
)
from causalrn.ops.context_parallel import active_split, sequence_part, whole_sequence
from causalrn.system import check_range


class LengthData(Protocol):
    """The part of a DataModule that is needed here: its validation samples at any length."""

    @property
    def training_lengths(self) -> tuple[int, int]: ...

    def positions(self, length: int) -> int: ...

    def length_loader(self, length: int, size: int, rows_per_rank: int) -> Any: ...


@dataclass(frozen=True)
class Bounds:
    """Limits of an evaluation at several lengths.

    Args:
        samples: strings at each length; of text, blocks of the training context, whose tokens longer blocks share.
        tokens_per_batch: tokens that each rank holds at a time, one row at least: the batch shrinks with the length.
        rows_per_batch: rows that each rank holds at a time at most.
        max_seconds: the evaluation ends after these; looked at after each batch.
    """

    samples: int = 64
    tokens_per_batch: int = 16384
    rows_per_batch: int = 1024
    max_seconds: float = 120.0

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("samples", "tokens_per_batch", "rows_per_batch")}
        check_range(None, "[1, inf)", **counts)
        check_range(None, "(0, inf]", max_seconds=self.max_seconds)


@dataclass(frozen=True)
class LengthResult:
    """The result at one length: `metrics` by their names, `first_errors` sorted, and losses by position for text."""

    length: int
    samples: int
    metrics: dict[str, float]
    first_errors: list[int] = field(default_factory=list)
    position_nats: list[float] = field(default_factory=list)
    position_count: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class LengthResults:
    """The results in ascending order of length, and why there are no more (empty if no length is missing)."""

    results: list[LengthResult]
    ended: str = ""

    def metrics(self, context: int | None = None) -> dict[str, float]:
        """All values by their logged names, as `val/exact_match/length_256`.

        Args:
            context: training context of a text model; adds the loss in each bucket of positions.
        """
        named = {
            f"val/{name}/length_{result.length}": value
            for result in self.results
            for name, value in result.metrics.items()
        }
        for start, stop, loss in self.buckets(context) if context else ():
            named[f"val/loss/positions_{start}_{stop}"] = loss
        return named

    def buckets(self, context: int) -> list[tuple[int, int, float]]:
        """Loss on positions [start, stop) of the longest blocks: the training context, then buckets that double."""
        if not self.results or not self.results[-1].position_nats:
            return []
        result, edges = self.results[-1], [0]
        while edges[-1] < len(result.position_nats):
            edges.append(min(max(context, 2 * edges[-1]), len(result.position_nats)))
        return [
            (
                start,
                stop,
                sum(result.position_nats[start:stop]) / max(sum(result.position_count[start:stop]), 1),
            )
            for start, stop in itertools.pairwise(edges)
        ]


def powers_of_two(data: LengthData, factor: int) -> list[int]:
    """1, 2, 4, ... up to `factor` times the longest training length."""
    longest = data.training_lengths[1]
    return [longest << power for power in range(factor.bit_length())]


def evaluate_lengths(
    network: nn.Module,
    data: LengthData,
    lengths: Iterable[int],
    bounds: Bounds,
    *,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    any_rank: Callable[[bool], bool] = bool,
) -> LengthResults:
    """Evaluates a network at ascending lengths until they, its abilities, the data or the time end.

    Under a process group the samples are split over the ranks and every rank gets the same result.

    Args:
        network: gives logits (B, T, V) of tokens (B, T); a ValueError says that it cannot take so many.
        data: DataModule with the samples.
        lengths: in the data's unit: letters of a string, tokens of a text.
        bounds: of memory and time.
        device: where the network is.
        context: precision of the forward pass.
        any_rank: whether something holds on any rank; all ranks ask at the same places.
    """
    results: list[LengthResult] = []
    start_seconds = time.monotonic()

    def out_of_time() -> bool:
        return any_rank(time.monotonic() - start_seconds > bounds.max_seconds)

    for length in sorted(set(lengths)):
        try:
            size = samples_at(data, length, bounds.samples)
            rows = max(1, min(bounds.rows_per_batch, bounds.tokens_per_batch // data.positions(length)))
            loader = data.length_loader(length, size, rows)
        except ValueError as error:
            return LengthResults(
                results, ending(results, f"there are no samples of length {length}: {error}")
            )
        metrics: dict[str, Metric] = make_metrics(data, length, device)
        done = 0
        for batch in loader:
            tokens, targets = batch["tokens"].to(device), batch["targets"].to(device)
            try:
                predictions, nats = predict(network, tokens, targets, context)
            except ValueError as error:
                return LengthResults(
                    results, ending(results, f"the network does not run at length {length}: {error}")
                )
            update(metrics, predictions, nats, targets)
            done += 1
            if done < len(loader) and out_of_time():
                break
        results.append(make_result(length, loader.samples_in(done), metrics))
        if done < len(loader) or out_of_time():
            seen = f"{results[-1].samples} samples of length {length}"
            if done < len(loader) or length < max(lengths):
                return LengthResults(results, f"the {bounds.max_seconds:g} seconds were over after {seen}")
    return LengthResults(results)


def samples_at(data: LengthData, length: int, samples: int) -> int:
    """Strings, or blocks of text with about as many tokens as `samples` blocks of the training context."""
    return max(1, samples * data.training_lengths[1] // length) if is_text(data) else samples


def ending(results: list[LengthResult], reason: str) -> str:
    return f"{reason}; the longest length is {results[-1].length}" if results else reason


@torch.no_grad()
def predict(
    network: nn.Module,
    tokens: Int[Tensor, "B T"],
    targets: Int[Tensor, "B T"],
    context: Callable[[], AbstractContextManager[Any]],
) -> tuple[Int[Tensor, "B T"], Float[Tensor, "B T"]]:
    """The most likely token and the loss at every position."""
    part = sequence_part(targets)
    with context():
        logits = network(sequence_part(tokens))
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), part.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return whole_sequence(logits.argmax(-1)), whole_sequence(nats.view_as(part))


def make_metrics(data: LengthData, length: int, device: torch.device) -> dict[str, Metric]:
    metrics = validation_metrics(data)
    if is_text(data):
        # The bytes of a block's positions are not counted; its loss is.
        del metrics["bits_per_byte"]
        metrics["positions"] = PositionLoss(data.positions(length))
    else:
        metrics["first_error"] = FirstErrors()
    for metric in metrics.values():
        metric.to(device)
        # Ranks that share their sequences hold the same rows, which would count several times.
        if active_split() is not None:
            metric.distributed_available_fn = lambda: False
    return metrics


def update(
    metrics: dict[str, Metric],
    predictions: Int[Tensor, "B T"],
    nats: Float[Tensor, "B T"],
    targets: Int[Tensor, "B T"],
) -> None:
    for metric in metrics.values():
        if isinstance(metric, MeanLoss):
            metric.update(nats.sum(), (targets != IGNORE_INDEX).sum())
        elif isinstance(metric, PositionLoss):
            metric.update(nats, targets)
        else:
            metric.update(predictions, targets)


def make_result(length: int, samples: int, metrics: dict[str, Metric]) -> LengthResult:
    """The metrics of all ranks."""
    values = {name: metric.compute() for name, metric in metrics.items()}
    extra: dict[str, list[Any]] = {}
    if "first_error" in values:
        values["first_error"], places = values["first_error"]
        extra["first_errors"] = places.tolist()
    if "positions" in values:
        nats, count = values.pop("positions")
        extra |= {"position_nats": nats.tolist(), "position_count": count.tolist()}
    return LengthResult(length, samples, {name: float(value) for name, value in values.items()}, **extra)
