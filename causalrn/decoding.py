"""Generating tokens from a trained model: one parallel pass over the prompt, then one step per token."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.models import LanguageModel


@torch.inference_mode()
def stream(
    network: LanguageModel,
    prompt: Int[Tensor, "B T"],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """Yields the tokens that follow the prompt, one position at a time.

    Args:
        network: a causal model.
        prompt: at least one token per row.
        max_new_tokens: number of tokens to yield.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draws among the k most likely tokens only.
        generator: source of randomness.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or more positions than the model has.
    """
    if prompt.shape[1] == 0:
        raise ValueError("prompt is empty; want at least one token")
    if int(prompt.min()) < 0 or int(prompt.max()) >= network.vocab_size:
        raise ValueError(
            f"prompt tokens must be in [0, {network.vocab_size}): got {int(prompt.min())} to {int(prompt.max())}"
        )
    length = prompt.shape[1] + max_new_tokens
    if length > network.max_length + 1:
        raise ValueError(
            f"prompt and new tokens need {length - 1} positions; the model has max_length={network.max_length}"
        )
    state = network.init_state(len(prompt))
    tokens = prompt
    for _ in range(max_new_tokens):
        logits, state = network.extend(tokens, state)
        token = sample(logits[:, -1], temperature, top_k, generator)
        yield token
        tokens = token[:, None]


def generate(
    network: LanguageModel, prompt: Int[Tensor, "B T"], max_new_tokens: int, **options
) -> Int[Tensor, "B N"]:
    """The tokens of `stream`, stacked; takes the same options."""
    return torch.stack(list(stream(network, prompt, max_new_tokens, **options)), dim=1)


def sample(
    logits: Float[Tensor, "B V"], temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Int[Tensor, " B"]:
    """One token per row."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
