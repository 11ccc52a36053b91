"""Blocks with a short convolution or a shift in front of the mixer, causal and bidirectional."""

import pytest
import torch

from causalrn.models import Block, LanguageModel, LinearRelation, ShortConvolution
from tests.models.networks import BLOCKS


@pytest.mark.parametrize("name", BLOCKS)
def test_no_gradient_from_the_future(name: str) -> None:
    convolution, mixer = BLOCKS[name]
    x = torch.randn(1, 7, 8, requires_grad=True)
    block = Block(convolution(), mixer(True), None)
    block.reset_parameters(1)
    (gradient,) = torch.autograd.grad(block(x)[0, 3].square().sum(), x)
    assert not gradient[0, 4:].any()
    assert gradient[0, :4].any(-1).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_bidirectional_block_sees_both_sides(name: str) -> None:
    convolution, mixer = BLOCKS[name]
    block = Block(convolution(), mixer(False), None)
    x = torch.randn(1, 5, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x)[0, 2].square().sum(), x)
    assert gradient[0].any(-1).all()
    with pytest.raises(ValueError, match="causal=False"):
        block.init_cache(1)


def test_a_convolution_of_another_width_is_named() -> None:
    with pytest.raises(ValueError, match="short_convolution and mixer must share d_model: got 6 and 8"):
        LanguageModel(LinearRelation(8, 8), 11, 1, 9, short_convolution=ShortConvolution(6))
