"""The interface of every mixer: causality by gradient, both sides where it is bidirectional, steps equal to forward."""

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import Mixer, QuadraticRelation
from tests.models.networks import MIXERS


@pytest.fixture(params=MIXERS)
def make_mixer(request: pytest.FixtureRequest) -> Callable[[bool], Mixer]:
    return MIXERS[request.param]


def test_no_gradient_from_the_future(make_mixer: Callable[[bool], Mixer]) -> None:
    x = torch.randn(1, 7, 8, requires_grad=True)
    mixer = make_mixer(True)
    mixer.reset_parameters(1)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 3].square().sum(), x)
    assert not gradient[0, 4:].any()
    assert gradient[0, :4].any(-1).all()


def test_a_bidirectional_mixer_sees_everything(make_mixer: Callable[[bool], Mixer]) -> None:
    x = torch.randn(1, 5, 8, requires_grad=True)
    mixer = make_mixer(False)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 2].square().sum(), x)
    assert gradient[0].any(-1).all()
    with pytest.raises(ValueError, match="causal=False"):
        mixer.init_cache(1)


def test_a_single_step_equals_forward(make_mixer: Callable[[bool], Mixer]) -> None:
    mixer = make_mixer(True)
    x = torch.randn(2, 5, 8)
    cache = mixer.init_cache(2)
    with torch.no_grad():
        for i in range(5):
            y, cache = mixer.step(x[:, i], cache)
            assert_close(y, mixer(x)[:, i], atol=1e-5, rtol=1e-5)


def test_the_cache_grows_only_where_it_must() -> None:
    for name, make in MIXERS.items():
        mixer = make(True)
        grows = mixer.cache_bytes(1000) > mixer.cache_bytes(10)
        assert grows == ("quadratic" in name or "softmax" in name), name
    assert QuadraticRelation(8, 12).cache_bytes(1000) == 1000 * 12 * 4


def test_heads_must_divide_channels() -> None:
    with pytest.raises(ValueError, match="d_hidden=10, n_heads=4"):
        QuadraticRelation(8, 10, n_heads=4)
