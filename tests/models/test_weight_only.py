"""Weights held in fewer bits: how far they move the logits, what they save, and that the copy task holds."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from causalrn.models import (
    MLP,
    LanguageModel,
    LinearAttention,
    LinearRelation,
    Mixer,
    QuadraticRelation,
    SoftmaxAttention,
)
from causalrn.models.decoding import GREEDY, generate
from causalrn.models.weight_only import StoredLinear, store_weights

MIXERS = {
    "quadratic": lambda: QuadraticRelation(16, 24),
    "linear": lambda: LinearRelation(16, 24),
    "softmax": lambda: SoftmaxAttention(16),
    "linear attention": lambda: LinearAttention(16),
}


@pytest.fixture(params=MIXERS)
def network(request: pytest.FixtureRequest) -> LanguageModel:
    mixer: Mixer = MIXERS[request.param]()
    mlp = MLP(16, 32) if isinstance(mixer, SoftmaxAttention) else None
    return LanguageModel(mixer, vocab_size=31, n_layers=2, max_length=40, mlp=mlp).eval()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.int8, 0.03)]
)
def test_logits_move_by_no_more_than_the_rounding(
    network: LanguageModel, dtype: torch.dtype, tolerance: float
) -> None:
    tokens = torch.randint(31, (2, 20))
    with torch.inference_mode():
        expected = network(tokens)
        stored = store_weights(copy.deepcopy(network), dtype)
        assert_close(stored(tokens), expected, atol=tolerance * float(expected.abs().max()), rtol=0)
        state, rows = stored.init_cache(2), []
        for token in tokens.split(1, dim=1):
            logits, state = stored.extend(token, state)
            rows.append(logits)
        assert_close(torch.cat(rows, 1), stored(tokens), atol=1e-5, rtol=1e-5)


def test_every_linear_layer_is_stored(network: LanguageModel) -> None:
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    weights = sum(linear.weight.numel() for linear in linears)
    for dtype in (torch.bfloat16, torch.int8):
        stored = store_weights(copy.deepcopy(network), dtype)
        layers = [module for module in stored.modules() if isinstance(module, StoredLinear)]
        assert len(layers) == len(linears)
        assert not any(isinstance(module, nn.Linear) for module in stored.modules())
        assert sum(layer.weight.nbytes for layer in layers) == weights * dtype.itemsize
        # Without gradients, so that nobody trains what cannot be trained.
        assert not any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def test_float32_weights_are_shared() -> None:
    linear = nn.Linear(5, 6)
    assert StoredLinear(linear, torch.float32).weight.data_ptr() == linear.weight.data_ptr()
    with pytest.raises(ValueError, match="float16"):
        StoredLinear(linear, torch.float16)


def test_rows_of_zeros_stay_zero() -> None:
    linear = nn.Linear(5, 2, bias=False)
    with torch.no_grad():
        linear.weight[0] = 0
    out = StoredLinear(linear, torch.int8)(torch.randn(3, 5))
    assert not out[:, 0].any()
    assert out[:, 1].all()


@pytest.mark.slow
def test_the_copy_task_holds() -> None:
    length, letters = 6, 8
    network = LanguageModel(QuadraticRelation(64, 64), letters + 3, n_layers=2, max_length=2 * length + 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)

    def strings(count: int) -> torch.Tensor:
        letters_of = torch.randint(3, letters + 3, (count, length))
        column = torch.zeros(count, 1, dtype=torch.int64)
        return torch.cat([column, letters_of, column + 1, letters_of, column + 2], 1)

    for _ in range(250):
        tokens = strings(64)
        logits = network(tokens[:, :-1])[:, length + 1 :]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, length + 2 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = strings(200)
    prompts, answers = tokens[:, : length + 2], tokens[:, length + 2 :]

    def exact_match(network: LanguageModel) -> float:
        return float((generate(network.eval(), prompts, length + 1, GREEDY) == answers).all(1).float().mean())

    assert exact_match(network) == 1
    for dtype in (torch.bfloat16, torch.int8):
        assert exact_match(store_weights(copy.deepcopy(network), dtype)) == 1
