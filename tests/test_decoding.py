"""Generation equals re-running the whole context per token, and refuses what it cannot do."""

import pytest
import torch

from causalrn.decoding import generate
from causalrn.models import LanguageModel, LinearRelation, QuadraticRelation


@pytest.fixture(params=[QuadraticRelation, LinearRelation])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(request.param(8, 12), vocab_size=11, n_layers=2, max_length=16).eval()


def test_greedy_equals_rerunning_the_context(model: LanguageModel) -> None:
    prompt = torch.randint(11, (3, 4))
    context = prompt
    with torch.no_grad():
        for _ in range(12):
            context = torch.cat([context, model(context)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, prompt, 12, temperature=0), context[:, 4:])


def test_sampling_is_reproducible_and_stays_in_top_k(model: LanguageModel) -> None:
    prompt = torch.randint(11, (2, 4))
    draws = [
        generate(model, prompt, 8, top_k=3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    best = model(prompt)[:, -1].topk(3).indices
    assert (draws[0][:, :1] == best).any(1).all()


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), 1, "empty"),
        (torch.tensor([[11]]), 1, r"\[0, 11\)"),
        (torch.zeros(1, 10, dtype=torch.int64), 8, "17 positions.*max_length=16"),
    ],
)
def test_bad_prompts_are_named(
    model: LanguageModel, prompt: torch.Tensor, new_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, new_tokens)
