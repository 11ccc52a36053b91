"""Growing caches: room, rows that join and split."""

import pytest
import torch

from causalrn.models.cache import GrowingCache, join_rows, select_rows


def test_cache_with_room_is_never_copied() -> None:
    cache = GrowingCache(capacity=50)
    addresses = {cache.append(torch.randn(2, 5, 1, 4)).data_ptr() for _ in range(10)}
    assert len(addresses) == 1
    assert cache.nbytes == 2 * 50 * 4 * 4
    cache.append(torch.randn(2, 1, 1, 4))
    assert cache.buffer is not None
    assert cache.buffer.shape[2] == 100


def test_rows_join_and_split() -> None:
    caches = [GrowingCache(), GrowingCache()]
    contents = [torch.randn(2, 3, 1, 4), torch.randn(1, 5, 1, 4)]
    for cache, content in zip(caches, contents, strict=True):
        cache.append(content)
    joined, tensor = join_rows([(caches[0], torch.ones(2)), (caches[1], torch.zeros(1))])
    assert tensor.tolist() == [1, 1, 0]
    assert joined.lengths.tolist() == [3, 3, 5]
    new = torch.randn(3, 1, 1, 4)
    after = joined.append(new)
    assert torch.equal(after[1, :4], torch.cat([contents[0][1], new[1]]))
    assert torch.equal(after[2], torch.cat([contents[1][0], new[2]]))
    with pytest.raises(ValueError, match="one position at a time: got 2"):
        joined.append(torch.randn(3, 2, 1, 4))
    twice = select_rows(joined, torch.tensor([2, 0, 2]))
    assert twice.lengths.tolist() == [6, 4, 6]
    assert torch.equal(twice.append(new)[1, :5], torch.cat([after[0, :4], new[1]]))
