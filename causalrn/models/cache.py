"""What decoding carries from position to position: growing pools, and operations on the rows of any mixer's state."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

# Positions of a new pool whose final length is not known.
FIRST_CAPACITY = 16


class PoolState:
    """A growing memory of vectors per position, as the quadratic relation's k or attention's k and v.

    A full buffer doubles, so that an appended position costs amortised O(1) copies. Rows of a batch may have
    different lengths: each is filled from position 0 on. A head's positions lie next to one another in memory: a step
    reads head by head.

    Args:
        dtype: of the stored vectors; that of the first appended ones if None.
        capacity: positions to make room for at once, where the final length is known.

    Attributes:
        buffer: (B, H, capacity, D).
        length: positions of the longest row.
        lengths: positions of each row, int64 (B,), or None where all have `length`.
    """

    def __init__(self, dtype: torch.dtype | None = None, capacity: int = 0) -> None:
        self.dtype = dtype
        self.capacity = max(capacity, FIRST_CAPACITY)
        self.buffer: Tensor | None = None
        self.length = 0
        self.lengths: Tensor | None = None

    def append(self, new: Float[Tensor, "B T H D"]) -> Float[Tensor, "B S H D"]:
        """Adds T positions to every row and returns the S positions so far (rows of `lengths` are valid up to them).

        Raises:
            ValueError: several positions at once for rows of different lengths.
        """
        end = self.length + new.shape[1]
        buffer = self.make_room(new, end)
        if self.lengths is None:
            buffer[:, :, self.length : end] = rearrange(new, "b t h d -> b h t d")
        elif new.shape[1] == 1:
            # Beyond the end of a shorter row: masked, but attention would multiply it by 0, so it must not be NaN.
            buffer[:, :, self.length] = 0
            buffer[torch.arange(len(new), device=new.device), :, self.lengths] = new[:, 0].to(buffer.dtype)
            self.lengths = self.lengths + 1
        else:
            raise ValueError(f"rows of different lengths take one position at a time: got {new.shape[1]}")
        self.length = end
        return rearrange(buffer[:, :, :end], "b h s d -> b s h d")

    def make_room(self, new: Float[Tensor, "B T H D"], end: int) -> Float[Tensor, "B H S D"]:
        """The buffer, large enough for `end` positions."""
        if self.buffer is None or end > self.buffer.shape[2]:
            batch, _, heads, channels = new.shape
            capacity = max(end, self.capacity, 2 * self.length)
            grown = new.new_empty(batch, heads, capacity, channels, dtype=self.dtype or new.dtype)
            if self.buffer is not None:
                grown[:, :, : self.length] = self.buffer[:, :, : self.length]
            self.buffer = grown
        return self.buffer

    def row_lengths(self, batch_size: int, device: torch.device) -> Int[Tensor, " B"]:
        """Positions of each row."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((batch_size,), self.length, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the positions held."""
        return 0 if self.buffer is None else self.buffer[:, :, : self.length].nbytes

    def select(self, rows: Int[Tensor, " N"]) -> "PoolState":
        """The given rows, with as much room as there is here."""
        assert self.buffer is not None
        pool = PoolState(self.dtype, self.capacity)
        pool.buffer = self.buffer.new_empty(len(rows), *self.buffer.shape[1:])
        pool.buffer[:, :, : self.length] = self.buffer[rows, :, : self.length]
        pool.length = self.length
        pool.lengths = None if self.lengths is None else self.lengths[rows]
        return pool


def select_rows(state: Any, rows: Int[Tensor, " N"]) -> Any:
    """The state of the given batch rows, in that order, each as often as it is named."""
    if isinstance(state, Tensor):
        return state[rows]
    if isinstance(state, PoolState):
        return state.select(rows)
    return rebuild(state, [select_rows(part, rows) for part in state])


def join_rows(states: Sequence[Any]) -> Any:
    """One state with the batch rows of all, in order; pools of different lengths become one with a length per row."""
    first = states[0]
    if len(states) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if isinstance(first, PoolState):
        return join_pools(states)
    return rebuild(first, [join_rows(parts) for parts in zip(*states, strict=True)])


def join_pools(pools: Sequence[PoolState]) -> PoolState:
    buffers = [pool.buffer for pool in pools if pool.buffer is not None]
    assert len(buffers) == len(pools)
    first = buffers[0]
    joined = PoolState(pools[0].dtype, pools[0].capacity)
    joined.length = max(pool.length for pool in pools)
    lengths = torch.cat([p.row_lengths(len(b), b.device) for p, b in zip(pools, buffers, strict=True)])
    joined.lengths = None if bool((lengths == joined.length).all()) else lengths
    _, heads, _, channels = first.shape
    capacity = max(joined.length, joined.capacity)
    joined.buffer = first.new_empty(len(lengths), heads, capacity, channels)
    row = 0
    for pool, buffer in zip(pools, buffers, strict=True):
        rows = slice(row, row + len(buffer))
        joined.buffer[rows, :, : pool.length] = buffer[:, :, : pool.length]
        joined.buffer[rows, :, pool.length : joined.length] = 0
        row = rows.stop
    return joined


def state_bytes(state: Any) -> int:
    """Bytes that a state holds."""
    if isinstance(state, Tensor | PoolState):
        return state.nbytes
    return sum(state_bytes(part) for part in state)


def rebuild(state: Any, parts: list[Any]) -> Any:
    """A list, tuple or named tuple like `state`, of other parts."""
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
