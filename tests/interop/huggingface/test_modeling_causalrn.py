"""The wrapper for transformers: the networks' logits, gradients and tokens, and outputs as transformers' own models give them."""

import os
from collections.abc import Callable
from typing import Any

# Before transformers is imported: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import LanguageModel, LinearRelation, QuadraticRelation, SoftmaxAttention
from causalrn.models.decoding import GREEDY, generate
from tests.interop.huggingface.networks import NETWORKS, make_model, make_network

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.slow

MIXERS = {
    "quadratic": lambda: QuadraticRelation(8, 12, n_heads=2),
    "linear": lambda: LinearRelation(8, 12),
    "softmax": lambda: SoftmaxAttention(8, n_heads=2),
}


@pytest.fixture(params=NETWORKS)
def make(request: pytest.FixtureRequest) -> Callable[[bool], LanguageModel]:
    return NETWORKS[request.param]


@pytest.mark.parametrize("causal", [True, False])
def test_logits_and_gradients_are_the_networks(make, causal: bool) -> None:
    network = make(causal)
    model = make_model(network)
    tokens = torch.randint(256, (2, 11))
    logits, expected = model(tokens).logits, network(tokens)
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients, expected_gradients = (
        {name: parameter.grad for name, parameter in m.named_parameters()} for m in (model.network, network)
    )
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-4, msg=name)


def test_generates_the_same_tokens(make) -> None:
    network = make(True)
    prompt = torch.randint(256, (2, 7))
    tokens = make_model(network).generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, 7:], generate(network, prompt, 20, GREEDY))


def test_left_padding_changes_nothing(make) -> None:
    network = make(True)
    prompts = [torch.randint(1, 256, (length,)) for length in (9, 3, 6)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    tokens = make_model(network).generate(
        padded, attention_mask=(padded != 0).long(), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(tokens[:, 9:], generate(network, prompts, 12, GREEDY))


def test_cached_steps_equal_the_whole(make) -> None:
    model = make_model(make(True))
    tokens = torch.randint(256, (2, 12))
    with torch.no_grad():
        whole = model(tokens).logits
        cache: Any = None
        rows = []
        for part in tokens.split([5, 1, 1, 3, 2], dim=1):
            out = model(part, past_key_values=cache)
            cache, rows = out.past_key_values, [*rows, out.logits]
        assert_close(torch.cat(rows, 1), whole, atol=1e-5, rtol=1e-5)
        assert cache.get_seq_length() == 12
        assert_close(model(tokens, logits_to_keep=1).logits, whole[:, -1:])
        assert model(tokens, use_cache=False).past_key_values is None


def test_beam_search_finds_the_likelier_text(make) -> None:
    model = make_model(make(True))
    prompt = torch.randint(256, (3, 5))

    def score(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            likelihoods = model(tokens[:, :-1]).logits.log_softmax(-1)
        return likelihoods.gather(-1, tokens[:, 1:, None])[:, 4:, 0].sum(1)

    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    # With as many beams as there are pairs of tokens to go wrong in, beam search cannot do worse here.
    greedy, best = (model.generate(prompt, num_beams=beams, **options) for beams in (1, 8))
    assert (score(best) >= score(greedy) - 1e-4).all()


def test_trains_with_labels() -> None:
    network = make_network(QuadraticRelation(8, 12))
    tokens = torch.randint(256, (2, 9))
    loss = make_model(network)(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(
        network(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert_close(loss, expected)


def test_mistakes_in_use_are_named() -> None:
    network = make_network(QuadraticRelation(8, 12))
    with pytest.raises(ValueError, match="sequence of 41 positions .*max_length=40"):
        make_model(network)(torch.zeros(1, 41, dtype=torch.int64))
    shifted = make_network(QuadraticRelation(8, 12, activation="official_elu"))
    tokens = torch.randint(256, (1, 9))
    assert_close(make_model(shifted)(tokens).logits, shifted(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="official_elu depends on the length still to come"):
        make_model(shifted).generate(tokens, max_new_tokens=2)


@pytest.fixture(params=MIXERS)
def network(request: pytest.FixtureRequest) -> Any:
    return make_network(MIXERS[request.param]())


def streams_of(network: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each block of the network reads, and what its head reads, by hooks."""
    found: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        for module in (*network.blocks, network.head)
    ]
    network(tokens)
    for hook in hooks:
        hook.remove()
    return found


def test_hidden_states_are_the_networks(network: Any) -> None:
    model, tokens = make_model(network), torch.randint(256, (2, 11))
    expected = streams_of(network, tokens)
    output = model(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == network.n_layers + 1 == len(expected)
    for mine, theirs in zip(output.hidden_states, expected, strict=True):
        assert mine.shape == (2, 11, 8)
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    # The last one is what the head reads, whatever logits are asked for.
    short = model(tokens, output_hidden_states=True, logits_to_keep=1)
    assert_close(short.hidden_states[-1], output.hidden_states[-1])
    assert_close(model.network.head(short.hidden_states[-1][:, -1:]), short.logits)
    assert model(tokens).hidden_states is None


def test_the_config_may_ask_for_them(network: Any) -> None:
    model, tokens = make_model(network), torch.randint(256, (2, 5))
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == 3
    assert model(tokens, output_hidden_states=False).hidden_states is None


def test_gradients_flow_through_hidden_states() -> None:
    network = make_network(QuadraticRelation(8, 12))
    model, tokens = make_model(network), torch.randint(256, (2, 5))
    model(tokens, output_hidden_states=True).hidden_states[1].square().sum().backward()
    assert model.network.blocks[0].mixer.q_proj.weight.grad.abs().max() > 0
    assert model.network.blocks[1].mixer.q_proj.weight.grad is None


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_returns_hidden_states(network: Any, beams: int) -> None:
    model, prompt = make_model(network), torch.randint(256, (2, 7))
    result = model.generate(
        prompt,
        max_new_tokens=4,
        do_sample=False,
        num_beams=beams,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_hidden_states=True,
    )
    assert len(result.hidden_states) == 4
    # The prompt's step first, then one position at a time.
    assert [step[-1].shape[1] for step in result.hidden_states] == [7, 1, 1, 1]
    assert all(len(step) == 3 for step in result.hidden_states)
    if beams == 1:
        with torch.no_grad():
            whole = model(result.sequences[:, :-1], output_hidden_states=True).hidden_states
        for layer, expected in enumerate(whole):
            steps = torch.cat([step[layer] for step in result.hidden_states], dim=1)
            assert_close(steps, expected, atol=1e-4, rtol=1e-4)


def test_a_tuple_holds_what_the_dictionary_does(network: Any) -> None:
    model, tokens = make_model(network), torch.randint(256, (2, 6))
    output = model(tokens, labels=tokens, output_hidden_states=True, use_cache=False)
    loss, logits, hidden_states = model(
        tokens, labels=tokens, output_hidden_states=True, use_cache=False, return_dict=False
    )
    assert_close(loss, output.loss)
    assert_close(logits, output.logits)
    assert_close(hidden_states, output.hidden_states)
    (logits, cache) = model(tokens, return_dict=False)
    assert_close(logits, output.logits)
    assert cache.get_seq_length() == 6
    model.config.return_dict = False
    assert isinstance(model(tokens), tuple)
    assert_close(model(tokens, return_dict=True).logits, output.logits)


def test_vectors_may_take_the_place_of_tokens(network: Any) -> None:
    model, tokens = make_model(network), torch.randint(1, 256, (2, 6))
    vectors = model.get_input_embeddings()(tokens)
    assert_close(model(inputs_embeds=vectors).logits, model(tokens).logits)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(inputs_embeds=vectors, attention_mask=torch.ones_like(tokens), **options)
    assert torch.equal(generated, model.generate(tokens, **options)[:, 6:])


def test_what_cannot_be_returned_is_refused(network: Any) -> None:
    model, tokens = make_model(network), torch.randint(256, (2, 6))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(tokens, inputs_embeds=model.get_input_embeddings()(tokens))
    with pytest.raises(ValueError, match="no attention weights; want output_attentions=False"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="no attention weights"):
        model.generate(
            tokens, max_new_tokens=2, pad_token_id=0, return_dict_in_generate=True, output_attentions=True
        )


def test_the_loss_of_accumulated_batches_is_that_of_one(network: Any) -> None:
    """The Trainer divides nothing itself where a model takes the number of tokens of all accumulated batches."""
    model, tokens = make_model(network), torch.randint(256, (4, 9))
    labels = tokens.clone()
    labels[0, :6] = -100
    whole = model(tokens, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    parts = [
        model(part, labels=wanted, num_items_in_batch=count).loss
        for part, wanted in zip(tokens.split(2), labels.split(2), strict=True)
    ]
    assert_close(sum(parts), whole)
