"""The blend of a position with its neighbours."""

import pytest
import torch

from causalrn.models import ShortConvolution


def test_the_blend_of_a_bidirectional_block_is_centred() -> None:
    shift = ShortConvolution(8, 5)
    x = torch.randn(1, 9, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(shift(x, causal=False)[0, 4].square().sum(), x)
    assert gradient[0].any(-1).tolist() == [2 <= position <= 6 for position in range(9)]


def test_an_empty_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size must be at least 1: got 0"):
        ShortConvolution(8, 0)
