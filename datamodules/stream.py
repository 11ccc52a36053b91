"""Loaders over an endless stream of samples in which one global index is the whole state."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.order import Int64Array

Batch = dict[str, torch.Tensor]

IGNORE_INDEX = -100


class Samples(Protocol):
    """What can be read by sample id; must survive being sent to a worker process."""

    def order(self, indices: Int64Array) -> Int64Array:
        """The ids of the samples at the global `indices` (N,) of the stream."""
        ...

    def read(self, ids: Int64Array) -> Batch:
        """The samples `ids` (B,) as tokens and targets, both int64 of shape (B, T)."""
        ...


@dataclass
class Position:
    """The next global sample index that training has not been given: the state of a run, on any number of ranks."""

    index: int = 0


@dataclass(frozen=True)
class Rank:
    """Which part of every global batch this process takes."""

    rank: int = 0
    world_size: int = 1

    def part(self, start: int, stop: int) -> Int64Array:
        """This rank's contiguous part of range(start, stop); parts differ in size by one at most."""
        size = stop - start
        return np.arange(
            start + size * self.rank // self.world_size,
            start + size * (self.rank + 1) // self.world_size,
        )


# Batches whose order is computed at a time: enough to make the cost per batch of vectorised hashing negligible.
_BATCHES_AHEAD = 64


class _RankBatches(Sampler[tuple[Int64Array, bool]]):
    """The sample ids of this rank's part of each batch of range(start, stop), and whether they count."""

    def __init__(self, samples: Samples, start: int, stop: int, batch_size: int, rank: Rank) -> None:
        self.samples = samples
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.rank = rank

    def __iter__(self) -> Iterator[tuple[Int64Array, bool]]:
        window = self.batch_size * _BATCHES_AHEAD
        for window_start in range(self.start, self.stop, window):
            window_stop = min(window_start + window, self.stop)
            parts = [
                self.rank.part(start, min(start + self.batch_size, window_stop))
                for start in range(window_start, window_stop, self.batch_size)
            ]
            # Where fewer samples than ranks are left, every rank must still take part in the step's collectives:
            # the ranks without one receive a sample of which nothing counts.
            counted = [part.size > 0 for part in parts]
            parts = [part if part.size else np.array([window_start]) for part in parts]
            ids = self.samples.order(np.concatenate(parts))
            ends = np.cumsum([part.size for part in parts])
            yield from zip(np.split(ids, ends[:-1]), counted, strict=True)

    def __len__(self) -> int:
        return (self.stop - self.start + self.batch_size - 1) // self.batch_size


class _BatchDataset(Dataset):
    """Reads one whole batch per item, so that the order of batches survives any number of workers."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, item: tuple[Int64Array, bool]) -> Batch:
        ids, counted = item
        batch = self.samples.read(ids)
        if not counted:
            batch["targets"].fill_(IGNORE_INDEX)
        return batch


def _load(batches: _RankBatches, num_workers: int) -> DataLoader:
    return DataLoader(
        _BatchDataset(batches.samples),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # None keeps torch's default; a prefetch factor without workers is refused by the DataLoader.
        prefetch_factor=4 if num_workers else None,
    )


class StreamLoader:
    """Training batches from `position` on: each pass gives `batches_per_epoch` batches and moves the position.

    A batch is `batch_size` samples with consecutive global indices, split over the ranks. The position counts
    batches handed out, not batches that workers prefetched. It is read when a pass gives its first batch, so a
    checkpoint may be restored any time before. The length is that of a whole pass, also after a resume: Lightning
    subtracts what it has already seen, and a loader without a length would lose the batch that Lightning prefetches.

    Raises:
        ValueError: if `batch_size` is not divisible by the number of ranks.
    """

    def __init__(
        self,
        samples: Samples,
        position: Position,
        *,
        batch_size: int,
        batches_per_epoch: int,
        rank: Rank,
        num_workers: int = 0,
        on_batch: Callable[[Batch], None] | None = None,
    ) -> None:
        if batch_size % rank.world_size:
            raise ValueError(
                f"batch_size is the number of samples per step over all ranks and must be divisible by their "
                f"number: got batch_size {batch_size} on {rank.world_size} ranks"
            )
        self.samples = samples
        self.position = position
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.rank = rank
        self.num_workers = num_workers
        self.on_batch = on_batch

    def __len__(self) -> int:
        return self.batches_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the owner's to save. Lightning takes a loader with this method for resumable.

        Lightning restores what a loader saves after the DataModule's state, and not at all where something asked
        for the training length early, so the DataModule's state is the one that counts.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert not state_dict

    def __iter__(self) -> Iterator[Batch]:
        start = self.position.index
        stop = start + self.batches_per_epoch * self.batch_size
        batches = _RankBatches(self.samples, start, stop, self.batch_size, self.rank)
        for batch in _load(batches, self.num_workers):
            self.position.index += self.batch_size
            if self.on_batch is not None:
                self.on_batch(batch)
            yield batch


class FixedLoader:
    """One pass over samples 0 .. size - 1 in order: a validation or test set, split over the ranks.

    Every rank receives the same number of batches, as sharded models need. Where fewer samples than ranks are
    left, the ranks without one receive a row whose targets are all ignored.
    """

    def __init__(
        self, samples: Samples, *, size: int, batch_size: int, rank: Rank, num_workers: int = 0
    ) -> None:
        self.batches = _RankBatches(samples, 0, size, batch_size, rank)
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(_load(self.batches, self.num_workers))
