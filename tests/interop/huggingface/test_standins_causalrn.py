"""What stands in for einops in an exported folder reshapes as einops does."""

import einops
import pytest
import torch

from causalrn.interop.huggingface import standins_causalrn

PATTERNS = [
    ((2, 4, 6), "b t (h d) -> b t h d", {"h": 3}),
    ((2, 4, 6, 5), "b t h d -> b h t d", {}),
    ((2, 4, 6, 5), "b h t d -> b t (h d)", {}),
    ((2, 4, 6), "b h i -> b i h 1", {}),
    ((2, 4), "b i -> b 1 i 1", {}),
    ((2, 4, 12), "b t (three h d) -> three b t h d", {"three": 2, "h": 3}),
    ((2, 4, 6), "a b c -> (c a) b", {}),
    ((6, 4, 6), "(a b) c (d e) -> (b a) (d c) e", {"a": 2, "e": 3}),
]


@pytest.mark.parametrize(("shape", "pattern", "sizes"), PATTERNS, ids=str)
def test_patterns_are_the_same_reshapes(shape: tuple[int, ...], pattern: str, sizes: dict[str, int]) -> None:
    x = torch.randn(shape)
    expected = einops.rearrange(x, pattern, **sizes)
    assert torch.equal(standins_causalrn.rearrange(x, pattern, **sizes), expected)


def test_compiled_kernels_are_never_there() -> None:
    assert not standins_causalrn.serves(torch.zeros(3))
    with pytest.raises(AttributeError):
        _ = standins_causalrn.__path__
