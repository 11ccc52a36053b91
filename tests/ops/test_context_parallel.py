"""A sequence split over ranks gives the outputs and gradients of one rank, in real processes over gloo."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from causalrn.ops import context_parallel as module
from causalrn.ops import relation_linear
from causalrn.ops.context_parallel import (
    context_parallel,
    mean_over_sequence,
    position_offset,
    sequence_part,
)
from causalrn.ops.reference import LinearState

BATCH, LENGTH, HEADS, CHANNELS, VOCABULARY = 3, 24, 2, 5, 7


class TwoLayers(nn.Module):
    """Embeddings with positions, two residual blocks of the linear relation, a head."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        width = HEADS * CHANNELS
        self.causal = causal
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.projections = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        start = position_offset(length)
        x = self.tokens(tokens) + self.positions(torch.arange(start, start + length))
        for layer in range(0, 6, 3):
            q, k = (self.projections[layer + n](x).unflatten(2, (HEADS, CHANNELS)) for n in (0, 1))
            y, _ = relation_linear(q, k, eps=1e-3, causal=self.causal)
            x = x + self.projections[layer + 2](y.flatten(2))
        return self.head(x)


def make_problem(causal: bool, dtype: torch.dtype) -> tuple[TwoLayers, Tensor, Tensor]:
    torch.manual_seed(1)
    model = TwoLayers(causal).to(dtype)
    tokens, targets = (torch.randint(VOCABULARY, (BATCH, LENGTH)) for _ in range(2))
    # As in the copying task, the first part has no target at all.
    targets[:, : LENGTH // 2] = -100
    targets[0, LENGTH // 2 : LENGTH - 3] = -100
    return model, tokens, targets


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return mean_over_sequence(total, (targets != -100).sum())


def compare_with_one_rank(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    rank, ranks = group.rank(), group.size()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    for causal in (True, False):
        model, tokens, targets = make_problem(causal, dtype)
        whole = model(tokens)
        loss = loss_of(whole, targets)
        wanted = torch.autograd.grad(loss, tuple(model.parameters()))
        with context_parallel(group) as split:
            assert (split.rank, split.ranks) == (rank, ranks)
            part = model(sequence_part(tokens))
            torch.testing.assert_close(part, sequence_part(whole), rtol=0, atol=tolerance)
            part_loss = loss_of(part, sequence_part(targets))
            actual = torch.autograd.grad(part_loss, tuple(model.parameters()))
        dist.all_reduce(part_loss)
        torch.testing.assert_close(part_loss / ranks, loss)
        for ours, theirs in zip(actual, wanted, strict=True):
            dist.all_reduce(ours)
            torch.testing.assert_close(ours / ranks, theirs, rtol=0, atol=tolerance)


def compile_in_parts(group: dist.ProcessGroup) -> None:
    model, tokens, targets = make_problem(True, torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    with context_parallel(group):
        tokens, targets = sequence_part(tokens), sequence_part(targets)
        parameters = tuple(model.parameters())
        wanted = torch.autograd.grad(loss_of(model(tokens), targets), parameters)
        actual = torch.autograd.grad(loss_of(compiled(tokens), targets), parameters)
    torch.testing.assert_close(actual, wanted)


def compare_uneven_parts(group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    rank, ranks = group.rank(), group.size()
    torch.manual_seed(2)
    lengths = [1, 9, 4][:ranks]
    q, k, dy = torch.randn(3, 2, sum(lengths), HEADS, CHANNELS, dtype=dtype).unbind()
    weight = torch.randn(2, HEADS, CHANNELS, dtype=dtype)
    for x in (q, k):
        x.requires_grad_()
    y, state = relation_linear(q, k, eps=1e-3)
    wanted = torch.autograd.grad((y, state.total), (q, k), (dy, weight))
    mine = [x.split(lengths, 1)[rank].detach().requires_grad_() for x in (q, k)]
    with context_parallel(group):
        part, after = relation_linear(mine[0], mine[1], eps=1e-3)
    # Only the last rank's state is that of the whole sequence.
    last = rank == ranks - 1
    assert after.count.tolist() == [sum(lengths[: rank + 1])] * 2
    part_dy = dy.split(lengths, 1)[rank]
    actual = torch.autograd.grad((part, after.total), mine, (part_dy, weight if last else 0 * weight))
    torch.testing.assert_close(part, y.split(lengths, 1)[rank])
    for ours, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.split(lengths, 1)[rank])
    if last:
        torch.testing.assert_close(after.total, state.total)


def exchange_sums_only(group: dist.ProcessGroup) -> None:
    """One (B, H*D + 1) tensor per call and direction, whatever the length."""
    sizes = []
    gather = module.gather
    module.gather = lambda mine, split: sizes.append(tuple(mine.shape)) or gather(mine, split)
    q = torch.randn(BATCH, 1000, HEADS, CHANNELS, requires_grad=True)
    with context_parallel(group):
        y, _ = relation_linear(q, q, eps=1e-3)
    y.square().sum().backward()
    assert sizes == [(BATCH, HEADS * CHANNELS + 1)] * 2
    module.gather = gather


def refuse_mistakes(group: dist.ProcessGroup) -> None:
    ranks = group.size()
    q = torch.zeros(2, 4, 1, 3)
    with context_parallel(group):
        with pytest.raises(ValueError, match=f"length of {ranks + 1}, wanted a multiple of the {ranks}"):
            sequence_part(torch.zeros(2, ranks + 1))
        with pytest.raises(ValueError, match="got a state of a sequence split over ranks"):
            relation_linear(q, q, LinearState(torch.zeros(2, 1, 3), torch.zeros(2)), eps=1e-3)
    assert position_offset(4) == 0


def run_rank(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    for dtype in (torch.float32, torch.float64):
        compare_with_one_rank(group, dtype)
        compare_uneven_parts(group, dtype)
    compile_in_parts(group)
    exchange_sums_only(group)
    refuse_mistakes(group)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_split_sequence(ranks: int, tmp_path: Path) -> None:
    spawn(run_rank, (ranks, str(tmp_path / "store")), nprocs=ranks)


def test_one_process_has_the_whole_sequence() -> None:
    x = torch.arange(6).view(1, 6)
    assert sequence_part(x) is x
    assert position_offset(5) == 0
    assert mean_over_sequence(torch.tensor(6.0), torch.tensor(4)) == 1.5
    # A batch whose samples could all not be read.
    assert mean_over_sequence(torch.tensor(0.0), torch.tensor(0)) == 0
