"""The shape annotations are checked: a wrong shape is refused in every module that names shapes, and can be let through."""

import importlib

import pytest
import torch
from jaxtyping import TypeCheckError

from causalrn.models import LanguageModel, LinearRelation
from causalrn.models.cache import GrowingCache
from tests.shapes import modules_with_shapes


def test_a_wrong_shape_is_refused() -> None:
    network = LanguageModel(LinearRelation(8, 12), vocab_size=11, n_layers=1, max_length=9)
    assert network(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 11)
    with pytest.raises(TypeCheckError, match="tokens"):
        network(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeCheckError, match="tokens"):
        network(torch.zeros(2, 5))


def test_a_wrong_result_is_refused() -> None:
    class Halves(LinearRelation):
        """A mixer whose own code keeps its promise to the caller, and whose inherited step does not."""

        def extend(self, x, cache):
            y, cache = super().extend(x, cache)
            return y[..., :4], cache

    mixer = Halves(8, 12)
    with pytest.raises(TypeCheckError, match="return value.*step"):
        mixer.step(torch.zeros(2, 8), mixer.init_cache(2))


def test_sizes_of_one_name_must_agree() -> None:
    with pytest.raises(TypeCheckError):
        GrowingCache().make_room(torch.zeros(2, 3), 4)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_test_can_let_wrong_shapes_through() -> None:
    network = LanguageModel(LinearRelation(8, 12), vocab_size=11, n_layers=1, max_length=9)
    assert network.unembed(torch.zeros(5, 8)).shape == (5, 11)


@pytest.mark.parametrize("name", modules_with_shapes())
def test_every_module_with_shapes_is_checked(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__spec__ is not None
    assert type(module.__spec__.loader).__module__.startswith("jaxtyping")
