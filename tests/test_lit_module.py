"""The learning rate at each step: warm-up, plateau and decay."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from causalrn.lit_module import CopyModule
from causalrn.models import LanguageModel, LinearRelation


def factors(max_steps: int, **settings: Any) -> list[float]:
    network = LanguageModel(LinearRelation(4, 4), 5, n_layers=1, max_length=4)
    module = CopyModule(network, learning_rate=2.0, warmup_steps=4, **settings)
    # Lightning lets a module have a trainer-like object only through its own attribute.
    module._trainer = SimpleNamespace(max_steps=max_steps)  # type: ignore[assignment]
    return [module.learning_rate_factor()(step) for step in range(max_steps + 1)]


def test_a_constant_rate_after_the_warm_up() -> None:
    assert factors(8) == [0.25, 0.5, 0.75, 1.0, *[1.0] * 5]


def test_the_cosine_begins_after_the_warm_up() -> None:
    rates = factors(14, final_learning_rate=1.0)
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 2)))
    assert rates[14] == 0.5


def test_a_line_over_the_second_half() -> None:
    rates = factors(20, final_learning_rate=0.0, decay="linear", decay_start=0.5)
    assert rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([0.1 * left for left in range(9, -1, -1)])


def test_a_wrong_share_is_named() -> None:
    with pytest.raises(ValueError, match="decay_start.*got 1.5"):
        factors(8, decay_start=1.5)
