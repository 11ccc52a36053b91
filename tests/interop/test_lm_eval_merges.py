"""lm-evaluation-harness with a BPE whose merges cross from a context into its continuation: nothing is scored as nothing."""

import math
import os
from typing import Any

# Before the libraries are imported: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

from causalrn.evaluation.codec import TextCodec
from causalrn.models import LanguageModel, QuadraticRelation
from datamodules.tokenizers import BpeTokenizer

pytest.importorskip("lm_eval", reason="the extra harness is not installed")
pytestmark = pytest.mark.slow

# One merge: "ab" is a token.
TOKENIZER = BpeTokenizer.train(["ab" * 50], 258)
END = TOKENIZER.eot_id


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text).tolist()


@pytest.fixture
def network() -> LanguageModel:
    network = LanguageModel(QuadraticRelation(8, 12), 258, n_layers=1, max_length=24)
    torch.nn.init.normal_(network.head.weight)
    return network.eval()


def model_of(network: LanguageModel) -> Any:
    from causalrn.interop.lm_eval import CheckpointLM

    return CheckpointLM(network, TextCodec(TOKENIZER.describe()), batch_size=2)


def requests_of(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # pyright: ignore[reportArgumentType]


def log_probability(network: LanguageModel, before: list[int], tokens: list[int]) -> float:
    """Token by token, each from what is left of it."""
    total = 0.0
    for index, token in enumerate(tokens):
        logits = network(torch.tensor([[*before, *tokens[:index]]]))[0, -1].detach()
        total += float(logits.log_softmax(-1)[token])
    return total


def test_pairs_are_scored_as_the_harness_parts_them_and_never_as_nothing(network: LanguageModel) -> None:
    assert len(tokens_of("dab")) == len(tokens_of("da")) == 2
    pairs = [
        ("da", "b"),
        ("da", " c"),
        ("a", "bc"),
        ("da ", "b"),
        ("  ", "ab"),
        ("", "ab"),
        ("xyz da", "b" * 5),
    ]
    found = model_of(network).loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    d, a, space = tokens_of("da ")
    (ab,) = tokens_of("ab")
    # The first merges into the context's last token: both texts, less the context.
    expected = [
        log_probability(network, [d], [ab]) - log_probability(network, [d], [a]),
        log_probability(network, [d, a], tokens_of(" c")),
        log_probability(network, [a], tokens_of("c")),
        log_probability(network, [d, a], [space, *tokens_of("b")]),
        log_probability(network, [END], tokens_of("  ab")),
        log_probability(network, [END], [ab]),
        log_probability(network, tokens_of("xyz da"), tokens_of("bbbb")),
    ]
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("merged", "apart", "answer"), [(6, 1, "b"), (1, 6, " ")])
def test_the_likelier_text_wins(merged: int, apart: int, answer: str) -> None:
    """Of 20 texts that go on after "d", `merged` are "dab" and `apart` are "da ": after "da" that decides.

    The tokens left after those of the context are none for "b", whose likelihood would be 1; those from where both
    encodings part would cost "b" the "a" as well, which " " has for nothing.
    """
    torch.manual_seed(0)
    rows = [tokens_of("dabe")] * merged + [tokens_of("da ")] * apart
    rows += [tokens_of("dff")] * (20 - merged - apart)
    batch = torch.tensor(rows)
    network = LanguageModel(QuadraticRelation(16, 16), 258, n_layers=1, max_length=8)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-2)
    for _ in range(150):
        logits = network(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    choices = ["b", " "]
    found = model_of(network).loglikelihood(
        requests_of("loglikelihood", [("da", choice) for choice in choices]), disable_tqdm=True
    )
    values = [value for value, _ in found]
    assert choices[values.index(max(values))] == answer
    assert values[0] == pytest.approx(math.log(merged / apart), abs=0.3)


def test_nothing_is_not_scored(network: LanguageModel) -> None:
    model = model_of(network)
    for context in ("da", ""):
        with pytest.raises(
            ValueError, match=f"likelihood of '' after '{context}', which adds no token"
        ) as raised:
            model.loglikelihood(requests_of("loglikelihood", [("x", "y"), (context, "")]), disable_tqdm=True)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="a continuation has no tokens"):
        model._loglikelihood_tokens([(None, [1, 2], [])])
    # Without a context the first token is predicted from the end of a document.
    ((value, _),) = model._loglikelihood_tokens([(None, [], tokens_of("xy"))])
    assert value == pytest.approx(log_probability(network, [END], tokens_of("xy")), abs=1e-4)


def test_an_empty_text_among_others_costs_nothing(network: LanguageModel) -> None:
    texts = [("ab",), ("",), ("x" * 30,)]
    values = model_of(network).loglikelihood_rolling(requests_of("loglikelihood_rolling", texts))
    assert [type(value) for value in values] == [float] * 3
    assert values[0] == pytest.approx(log_probability(network, [END], tokens_of("ab")), abs=1e-4)
    assert values[1] == 0.0
    assert values[2] < 0
