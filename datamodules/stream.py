"""Loaders over an endless stream of samples in which one global index is the whole state."""

import contextlib
import itertools
import math
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datamodules.errors import ShardError
from datamodules.order import Int64Array
from datamodules.ranges import check_batch_size

# The target that losses and metrics leave out.
IGNORE_INDEX = -100


class Batch(TypedDict):
    """Tokens, and what each position predicts: the token after it, or IGNORE_INDEX."""

    tokens: Int64[Tensor, "B T"]
    targets: Int64[Tensor, "B T"]


# A worker sends small arrays and lists for a batch, because tensors would travel through shared memory, which is slower.
Rows = dict[str, Any]

# The order of so many batches is computed at a time, which makes the cost of hashing per batch negligible.
_BATCHES_AHEAD = 64
# A worker sends about so many samples at a time, because the queue costs as much for one small batch as for a few.
_SAMPLES_PER_ITEM = 256
# A worker lives on for so long after SIGTERM. Schedulers wait less before they kill.
_GRACE_SECONDS = 120


class Samples(Protocol):
    """A data set that is read by sample id; it must survive being sent to a worker process."""

    def order(self, indices: Int64Array) -> Int64Array:
        """The ids of the samples at the global `indices` (N,) of the stream."""
        ...

    def read(self, ids: Int64Array) -> Rows:
        """The samples `ids` (B,) in a compact form; runs in a worker."""
        ...

    def expand(self, rows: Rows) -> Batch:
        """Tokens and targets (B, T), int64, out of what `read` gave; runs in the training process."""
        ...


@dataclass
class Position:
    """The next global sample index that training has not been given: the state of a run, on any number of ranks."""

    index: int = 0


@dataclass(frozen=True)
class Rank:
    """This process among those that share every global batch."""

    rank: int = 0
    world_size: int = 1

    def part(self, start: int, stop: int) -> Int64Array:
        """This rank's contiguous part of range(start, stop); parts differ in size by one at most."""
        size = stop - start
        return np.arange(
            start + size * self.rank // self.world_size,
            start + size * (self.rank + 1) // self.world_size,
        )


def widen(array: npt.NDArray[Any]) -> Int64[Tensor, "B T"]:
    """An int64 tensor of the same values (B, T), in pinned memory where there is a GPU to copy to."""
    out = torch.empty(array.shape, dtype=torch.int64, pin_memory=torch.cuda.is_available())
    np.copyto(out.numpy(), array, casting="same_kind" if array.dtype.kind == "i" else "safe")
    return out


@dataclass(eq=False, kw_only=True)
class _Loader:
    """Base of the two loaders: settings, and reading with workers."""

    samples: Samples
    batch_size: int
    rank: Rank
    num_workers: int = 0
    on_rows: Callable[[Rows], None] | None = None

    def load(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's part of the samples at the global indices from `start` to `stop`, in batches."""
        batches = _RankBatches(self.samples, start, stop, self.batch_size, self.rank)
        with contextlib.closing(_items(batches, self.num_workers)) as items:
            for loaded in itertools.chain.from_iterable(items):
                if isinstance(loaded, ShardError):
                    raise loaded
                rows, counted = loaded
                if self.on_rows is not None:
                    self.on_rows(rows)
                batch = self.samples.expand(rows)
                if not counted:
                    batch["targets"].fill_(IGNORE_INDEX)
                yield batch


@dataclass(eq=False, kw_only=True)
class StreamLoader(_Loader):
    """Training batches from `position` on: each pass gives `batches_per_epoch` batches and moves the position.

    A batch is `batch_size` samples with consecutive global indices, split over the ranks. The position counts
    batches handed out, not batches that workers prefetched. It is read when a pass gives its first batch, so a
    checkpoint may be restored any time before. The length is that of a whole pass, also after a resume: Lightning
    subtracts what it has already seen, and a loader without a length would lose the batch that Lightning prefetches.

    Raises:
        ValueError: if `batch_size` is not divisible by the number of ranks.
    """

    position: Position
    batches_per_epoch: int

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, self.rank.world_size)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        start = self.position.index
        for batch in self.load(start, start + self.batches_per_epoch * self.batch_size):
            self.position.index += self.batch_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """An empty state, because the DataModule saves the position.

        The method must exist, because Lightning resumes in the middle of an epoch only with a loader that has it. What
        a loader saves is not restored where something asked for the training length early, so nothing is kept here.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert not state_dict


@dataclass(eq=False, kw_only=True)
class FixedLoader(_Loader):
    """One pass over samples 0 .. size - 1 in order: a validation or test set, split over the ranks.

    Every rank receives the same number of batches, as sharded models need. Where fewer samples than ranks are
    left, the ranks without one receive a row whose targets are all ignored.
    """

    size: int

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def samples_in(self, batches: int) -> int:
        """Samples, over all ranks, in the first `batches` batches."""
        return min(batches * self.batch_size, self.size)

    def __iter__(self) -> Iterator[Batch]:
        return self.load(0, self.size)


# The sample ids of one batch on one rank, and whether they count.
_Part = tuple[Int64Array, bool]
_Loaded = tuple[Rows, bool] | ShardError


class _RankBatches(Sampler[list[_Part]]):
    """This rank's part of each batch of range(start, stop), a few batches at a time."""

    def __init__(self, samples: Samples, start: int, stop: int, batch_size: int, rank: Rank) -> None:
        self.samples = samples
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.rank = rank

    def __iter__(self) -> Iterator[list[_Part]]:
        per_item = max(1, _SAMPLES_PER_ITEM * self.rank.world_size // self.batch_size)
        parts = self._parts()
        while item := list(itertools.islice(parts, per_item)):
            yield item

    def _parts(self) -> Iterator[_Part]:
        window = self.batch_size * _BATCHES_AHEAD
        for window_start in range(self.start, self.stop, window):
            window_stop = min(window_start + window, self.stop)
            parts = [
                self.rank.part(start, min(start + self.batch_size, window_stop))
                for start in range(window_start, window_stop, self.batch_size)
            ]
            counted = [part.size > 0 for part in parts]
            # A rank without a sample must still take part in the step's collectives, so it reads one for nothing.
            parts = [part if part.size else np.array([window_start]) for part in parts]
            ids = self.samples.order(np.concatenate(parts))
            ends = np.cumsum([part.size for part in parts])
            yield from zip(np.split(ids, ends[:-1]), counted, strict=True)


class _BatchDataset(Dataset[list[_Loaded]]):
    """Reads whole batches, so that their order survives any number of workers."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, item: list[_Part]) -> list[_Loaded]:
        return [self._load(*part) for part in item]

    def _load(self, ids: Int64Array, counted: bool) -> _Loaded:
        try:
            return self.samples.read(ids), counted
        except ShardError as error:
            # Returned instead of raised: the DataLoader would wrap the message in a worker's traceback.
            return error


def _items(batches: _RankBatches, num_workers: int) -> Generator[list[_Loaded], None, None]:
    """The batches that workers read, a few at a time; the workers end with the iteration.

    Raises:
        ChildProcessError: of one line, if a worker process dies.
    """
    loader = DataLoader(
        _BatchDataset(batches.samples),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        # The default collation would turn arrays into tensors, and tensors travel in shared memory: slower here.
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_signals,
        # A loader draws a seed for its workers, of which these need none. A resumed run draws it at another place, so
        # it must not come from the random numbers of the training itself.
        generator=torch.Generator(),
        # A prefetch factor without workers is refused by the DataLoader.
        prefetch_factor=4 if num_workers else None,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(f"a data worker process died: {str(error).splitlines()[0]}") from None
    finally:
        # Ends the workers here. At the end of the process a queue may close before it could tell its worker, which
        # then waits 5 s.
        del iterator


def _as_it_is(item: Any) -> Any:
    """A collation that leaves arrays arrays."""
    return item


def _ignore_signals(worker: int) -> None:
    """Runs at the start of each worker process."""
    # A scheduler that signals a job, or a terminal's Ctrl-C, reaches the workers too, which have inherited the handlers
    # of the training process. That process alone decides what to do, and needs their batches until it has saved.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # A worker that the training process itself ends must not stay.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))
