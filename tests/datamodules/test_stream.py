"""Loaders: the position, the parts of ranks, workers, and what a process that dies leaves behind."""

import itertools
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.order import Int64Array, shuffled
from datamodules.shards import ShardError
from datamodules.stream import Batch, FixedLoader, Position, Rank, Rows, StreamLoader, widen

SIZE = 23


class Numbers:
    """Samples that are their own ids; id 13 can be made unreadable, or the worker that reads it made to die."""

    def __init__(self, fault: str | None = None) -> None:
        self.fault = fault

    def order(self, indices: Int64Array) -> Int64Array:
        return shuffled(SIZE, 0, indices)

    def read(self, ids: Int64Array) -> Rows:
        if 13 in ids and self.fault == "unreadable":
            raise ShardError("shard x.tar is damaged")
        if 13 in ids and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"tokens": ids[:, None].astype(np.int32)}

    def expand(self, rows: Rows) -> Batch:
        return {"tokens": widen(rows["tokens"]), "targets": widen(rows["tokens"])}


def loader(
    position: Position, rank: Rank, *, batch_size: int = 4, batches: int = 5, workers: int = 0
) -> StreamLoader:
    return StreamLoader(
        samples=Numbers(),
        position=position,
        batch_size=batch_size,
        batches_per_epoch=batches,
        rank=rank,
        num_workers=workers,
    )


def ids(batches: Iterator[Batch]) -> list[list[int]]:
    return [batch["tokens"].flatten().tolist() for batch in batches]


@pytest.mark.slow
@given(
    start=st.integers(0, 100),
    world_size=st.sampled_from([1, 2, 3, 4]),
    per_rank=st.integers(1, 3),
    batches=st.integers(1, 70),
)
@settings(max_examples=40, deadline=None)
def test_ranks_share_the_global_batches(start: int, world_size: int, per_rank: int, batches: int) -> None:
    batch_size = world_size * per_rank
    parts = []
    for rank in range(world_size):
        position = Position(start)
        parts.append(
            ids(iter(loader(position, Rank(rank, world_size), batch_size=batch_size, batches=batches)))
        )
        assert position.index == start + batches * batch_size
    expected = shuffled(SIZE, 0, np.arange(start, start + batches * batch_size)).reshape(batches, batch_size)
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_position_counts_what_was_handed_out_not_what_was_prefetched(workers: int) -> None:
    position = Position()
    iterator = iter(loader(position, Rank(), workers=workers))
    assert position.index == 0
    first, second = next(iterator), next(iterator)
    assert position.index == 8
    rest = ids(iter(loader(position, Rank(), workers=workers)))
    assert ids(iter([first, second])) + rest[:3] == ids(iter(loader(Position(), Rank())))


def test_a_position_restored_after_iter_was_called_still_counts() -> None:
    position = Position()
    iterator = iter(loader(position, Rank()))
    position.index = 12
    assert next(iterator)["tokens"].flatten().tolist() == shuffled(SIZE, 0, np.arange(12, 16)).tolist()


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(
        ValueError, match="batch_size 4 counts .* not divisible by 3 ranks; want for example 3 or 6"
    ):
        loader(Position(), Rank(0, 3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_rank_gets_as_many_batches_of_a_fixed_set_and_each_sample_counts_once(world_size: int) -> None:
    loaders = [
        FixedLoader(samples=Plain(), size=9, batch_size=4, rank=Rank(rank, world_size))
        for rank in range(world_size)
    ]
    batches = [list(each) for each in loaders]
    assert {len(each) for each in batches} == {len(loaders[0])} == {3}
    counted = [
        number
        for each in batches
        for batch in each
        for number in batch["targets"][batch["targets"] != -100].tolist()
    ]
    assert sorted(counted) == list(range(9))


class Plain(Numbers):
    def order(self, indices: Int64Array) -> Int64Array:
        return indices


@pytest.mark.parametrize("workers", [0, 1])
def test_what_comes_before_an_unreadable_batch_is_delivered(workers: int) -> None:
    position = Position()
    stream = StreamLoader(
        samples=Numbers("unreadable"),
        position=position,
        batch_size=1,
        batches_per_epoch=SIZE,
        rank=Rank(),
        num_workers=workers,
    )
    seen: list[int] = []
    with pytest.raises(ShardError, match=r"^shard x.tar is damaged$"):
        seen.extend(int(batch["tokens"]) for batch in stream)
    order = shuffled(SIZE, 0, np.arange(SIZE)).tolist()
    assert seen == order[: order.index(13)]
    assert position.index == len(seen)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_one_line() -> None:
    stream = StreamLoader(
        samples=Numbers("killed"),
        position=Position(),
        batch_size=SIZE,
        batches_per_epoch=2,
        rank=Rank(),
        num_workers=1,
    )
    with pytest.raises(ChildProcessError, match="a data worker process died") as raised:
        list(stream)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_workers_outlive_the_signals_of_a_scheduler() -> None:
    iterator = iter(loader(Position(), Rank(), batches=400, workers=1))
    next(iterator)
    (worker,) = torch.multiprocessing.active_children()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        assert worker.pid is not None
        os.kill(worker.pid, number)
    assert len(list(iterator)) == 399


def test_widening_keeps_values_of_every_type() -> None:
    for dtype in ("uint8", "uint16", "uint32", "int32"):
        array = np.array([[0, 1], [2, np.iinfo(dtype).max]], dtype=dtype)
        assert widen(array).dtype == torch.int64
        assert widen(array).tolist() == array.tolist()
