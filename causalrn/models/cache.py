"""Caches that decoding carries from position to position: one that grows, and operations on the rows of any mixer's cache."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

# Positions of a new cache whose final length is not known.
FIRST_CAPACITY = 16


class GrowingCache:
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
            # This place lies beyond the end of a shorter row. It is masked, but attention multiplies it by 0: it must not be NaN.
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

    def select(self, rows: Int[Tensor, " N"]) -> "GrowingCache":
        """The given rows, with as much room as there is here."""
        assert self.buffer is not None
        cache = GrowingCache(self.dtype, self.capacity)
        cache.buffer = self.buffer.new_empty(len(rows), *self.buffer.shape[1:])
        cache.buffer[:, :, : self.length] = self.buffer[rows, :, : self.length]
        cache.length = self.length
        cache.lengths = None if self.lengths is None else self.lengths[rows]
        return cache


def select_rows(cache: Any, rows: Int[Tensor, " N"]) -> Any:
    """The cache of the given batch rows, in that order, each as often as it is named."""
    if isinstance(cache, Tensor):
        return cache[rows]
    if isinstance(cache, GrowingCache):
        return cache.select(rows)
    return rebuild(cache, [select_rows(part, rows) for part in cache])


def join_rows(caches: Sequence[Any]) -> Any:
    """One cache with the batch rows of all, in order; caches of different lengths become one with a length per row."""
    first = caches[0]
    if len(caches) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(caches))
    if isinstance(first, GrowingCache):
        return join_caches(caches)
    return rebuild(first, [join_rows(parts) for parts in zip(*caches, strict=True)])


def join_caches(caches: Sequence[GrowingCache]) -> GrowingCache:
    buffers = [cache.buffer for cache in caches if cache.buffer is not None]
    assert len(buffers) == len(caches)
    first = buffers[0]
    joined = GrowingCache(caches[0].dtype, caches[0].capacity)
    joined.length = max(cache.length for cache in caches)
    lengths = torch.cat([p.row_lengths(len(b), b.device) for p, b in zip(caches, buffers, strict=True)])
    joined.lengths = None if bool((lengths == joined.length).all()) else lengths
    _, heads, _, channels = first.shape
    capacity = max(joined.length, joined.capacity)
    joined.buffer = first.new_empty(len(lengths), heads, capacity, channels)
    row = 0
    for cache, buffer in zip(caches, buffers, strict=True):
        rows = slice(row, row + len(buffer))
        joined.buffer[rows, :, : cache.length] = buffer[:, :, : cache.length]
        joined.buffer[rows, :, cache.length : joined.length] = 0
        row = rows.stop
    return joined


def held_bytes(cache: Any) -> int:
    """Bytes that a cache holds."""
    if isinstance(cache, Tensor | GrowingCache):
        return cache.nbytes
    return sum(held_bytes(part) for part in cache)


def rebuild(cache: Any, parts: list[Any]) -> Any:
    """A list, tuple or named tuple like `cache`, of other parts."""
    return type(cache)(*parts) if hasattr(cache, "_fields") else type(cache)(parts)
