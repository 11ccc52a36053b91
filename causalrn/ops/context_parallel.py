"""One sequence over several ranks: each holds a consecutive part, and only sums of the state's size travel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from causalrn.ops.reference import LinearState


class SequenceSplit(NamedTuple):
    """The part of the sequence that this rank holds. The parts follow each other in the order of the ranks."""

    group: dist.ProcessGroup
    rank: int
    ranks: int


# One for the whole process, and not an argument of every network, mixer and loss in between. Nor one per thread: the
# backward pass of a checkpointed block runs its forward pass again, on another thread.
_active: SequenceSplit | None = None


@contextmanager
def context_parallel(group: dist.ProcessGroup) -> Iterator[SequenceSplit]:
    """Within it, `relation_linear` takes q and k to be this rank's part of sequences that lie over the ranks of `group`.

    All ranks of the group must make the same calls in the same order, forward and backward (a rank without a target
    takes part with a loss of 0). Each call exchanges one (B, H*D + 1) tensor of each rank in the forward pass, and
    one in the backward pass. Parameters get, on each rank, their gradient by way of this rank's positions: the sum
    over the ranks is that of the whole sequence. A group of its own keeps the exchange apart from the all-reduce
    of the gradients.
    """
    global _active
    before = _active
    _active = SequenceSplit(group, dist.get_rank(group), dist.get_world_size(group))
    try:
        yield _active
    finally:
        _active = before


def active_split() -> SequenceSplit | None:
    """The split of the sequence, or None outside `context_parallel`."""
    return _active


def position_offset(length: int) -> int:
    """Positions before this rank's part, where every rank holds `length` of them; 0 outside `context_parallel`."""
    return 0 if _active is None else _active.rank * length


def sequence_part(x: Tensor, dim: int = 1) -> Tensor:
    """This rank's part of a tensor that every rank holds whole; x itself outside `context_parallel`.

    Raises:
        ValueError: the ranks do not divide the length.
    """
    if _active is None:
        return x
    if x.shape[dim] % _active.ranks:
        raise ValueError(
            f"a sequence split over {_active.ranks} ranks: got a length of {x.shape[dim]}, wanted a multiple of the "
            f"{_active.ranks} ranks"
        )
    return x.chunk(_active.ranks, dim)[_active.rank]


def whole_sequence(part: Tensor, dim: int = 1) -> Tensor:
    """The ranks' parts joined, without gradients; the tensor itself outside `context_parallel`."""
    return part if _active is None else torch.cat(gather(part, _active), dim)


def mean_over_sequence(total: Float[Tensor, ""], count: Tensor) -> Float[Tensor, ""]:
    """total / count, where both are sums over positions; a loss whose average over the ranks is the mean.

    Within `context_parallel` the count is that of the whole sequences, and the result is multiplied by the number of
    ranks. DDP, which averages gradients over ranks, then forms the gradient of the mean over all positions,
    even where one rank holds more targets than another, or none.
    """
    # A batch of nothing but unreadable samples has no target: it must teach nothing, and not be 0 / 0.
    if _active is None:
        return total / count.clamp(min=1)
    count = count.to(total.dtype, copy=True)
    dist.all_reduce(count, group=_active.group)
    return total * (_active.ranks / count.clamp(min=1))


# A collective has no place in a compiled graph: torch.compile breaks the graph here.
@torch.compiler.disable(recursive=True)
def state_elsewhere(
    own: Float[Tensor, "B H D"], length: int, causal: bool, split: SequenceSplit
) -> LinearState:
    """The state that the parts on other ranks leave for this one: those before it, or all others if not causal.

    Args:
        own: the sum that this rank's part adds to the total, from `relation_linear_total`; gradients flow into it from the
            other ranks' results.
        length: positions of this rank's part, which may differ from rank to rank.
    """
    # The counts travel with the sums.
    sums = torch.cat([own.flatten(1), own.new_full((own.shape[0], 1), length)], 1)
    sums = Exchange.apply(sums, causal, split)
    assert isinstance(sums, Tensor)
    return LinearState(sums[:, :-1].view_as(own), sums[:, -1].float())


class Exchange(torch.autograd.Function):
    """Sums the tensors of the ranks before this one, or of all others.

    The backward pass sums the gradients of the ranks after it, or of all others.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, causal: bool, split: SequenceSplit) -> Tensor:
        ctx.causal, ctx.split = causal, split
        gathered = gather(mine, split)
        return add(mine, gathered[: split.rank] + ([] if causal else gathered[split.rank + 1 :]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        gathered = gather(grad, ctx.split)
        after = gathered[ctx.split.rank + 1 :]
        return add(grad, after if ctx.causal else gathered[: ctx.split.rank] + after), None, None


def gather(mine: Tensor, split: SequenceSplit) -> list[Tensor]:
    """Every rank's tensor, in the order of the ranks."""
    parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(split.ranks)]
    dist.all_gather(parts, mine.contiguous(), group=split.group)
    return parts


def add(like: Tensor, parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0) if parts else torch.zeros_like(like)
