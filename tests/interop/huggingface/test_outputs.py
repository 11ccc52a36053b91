"""What an exported model returns beside its logits: hidden states, tuples and losses as transformers' own models do."""

import os
from typing import Any

# Before transformers is imported: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import LinearRelation, QuadraticRelation, SoftmaxAttention
from tests.interop.huggingface.test_folder import make_model, make_network

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.slow

MIXERS = {
    "quadratic": lambda: QuadraticRelation(8, 12, n_heads=2),
    "linear": lambda: LinearRelation(8, 12),
    "softmax": lambda: SoftmaxAttention(8, n_heads=2),
}


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
