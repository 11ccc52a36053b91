"""Generating tokens from a trained model: one parallel pass over the prompts, then one step per token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalrn.models import LanguageModel
from causalrn.models.cache import join_rows, select_rows
from causalrn.models.language_model import DecodingState
from causalrn.system import available_bytes, check_range, format_bytes

# Positions of one parallel pass: more would only cost memory.
PREFILL_POSITIONS = 4096


@dataclass(frozen=True)
class Sampling:
    """The way in which a token is drawn from logits, in this order: penalty, temperature, top-k, top-p.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draws among the k most likely tokens only.
        top_p: draws among the fewest tokens that hold this share of the probability.
        repetition_penalty: divides the positive and multiplies the negative logits of every token in the prompt or
            the text so far (arXiv 1909.05858); 1 for none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_range(None, "[0, inf)", temperature=self.temperature)
        check_range(None, "[1, inf)", top_k=self.top_k)
        check_range(None, "(0, 1]", top_p=self.top_p)
        check_range(None, "(0, inf)", repetition_penalty=self.repetition_penalty)


GREEDY = Sampling(temperature=0)


def stream(
    network: LanguageModel,
    prompts: Int[Tensor, "B T"] | Sequence[Int[Tensor, " _"]],
    max_new_tokens: int | None,
    sampling: Sampling,
    *,
    samples: int = 1,
    stop_tokens: Sequence[int] = (),
    cache_dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " rows"]]:
    """Yields the tokens that follow each prompt, one position at a time, as they come.

    Args:
        network: a causal model.
        prompts: at least one token per row; a list of rows may hold rows of different lengths, each of which is
            continued as it would be alone.
        max_new_tokens: number of tokens to yield; as many as the model has positions for if None, where these end.
        sampling: how each token is drawn.
        samples: continuations of each prompt, whose rows follow one another; the prompt is read once for all. There are
            B * samples rows.
        stop_tokens: tokens that end a row. It repeats the token until every row has ended.
        cache_dtype: of the stored k (and v) of past positions; that of the weights if None.
        generator: source of randomness, on the network's device.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, more positions than the model has, a state larger
            than the memory, or a setting out of range. All are raised here, before the first token.
    """
    rows = list(prompts)
    check_prompts(rows, network)
    check_range(None, "[1, inf)", samples=samples)
    longest = max(len(row) for row in rows)
    count = count_new_tokens(network, longest, max_new_tokens)
    # The last token is not read by the model any more.
    capacity = longest + count - 1
    check_memory(network, len(rows) * samples, capacity, cache_dtype)

    @torch.inference_mode()
    def run() -> Iterator[Int[Tensor, " rows"]]:
        logits, state = prefill(network, rows, cache_dtype=cache_dtype, capacity=capacity)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.stack([torch.bincount(row, minlength=network.vocab_size) > 0 for row in rows])
        if samples > 1:
            chosen = torch.arange(len(rows), device=logits.device).repeat_interleave(samples)
            logits, state = logits[chosen], select(state, chosen)
            seen = None if seen is None else seen[chosen]
        stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=logits.device)
        tokens, stopped = None, torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        for index in range(count):
            drawn = sample(logits, sampling, seen, generator)
            tokens = drawn if tokens is None else torch.where(stopped, tokens, drawn)
            yield tokens
            stopped = stopped | torch.isin(tokens, stops)
            if index + 1 == count or (stop_tokens and bool(stopped.all())):
                return
            if seen is not None:
                seen[torch.arange(len(tokens), device=tokens.device), tokens] = True
            x, state = network.advance(tokens[:, None], state)
            logits = network.unembed(x)[:, 0]

    return run()


def generate(
    network: LanguageModel,
    prompts: Int[Tensor, "B T"] | Sequence[Int[Tensor, " _"]],
    max_new_tokens: int | None,
    sampling: Sampling,
    **options,
) -> Int[Tensor, "rows N"]:
    """The tokens of `stream`, stacked, `samples` rows for each prompt; takes the same options.

    Shorter where every row met a stop token.
    """
    tokens = list(stream(network, prompts, max_new_tokens, sampling, **options))
    if not tokens:
        return torch.empty(len(prompts) * options.get("samples", 1), 0, dtype=torch.int64)
    return torch.stack(tokens, dim=1)


def check_prompts(rows: Sequence[Int[Tensor, " _"]], network: LanguageModel) -> None:
    """Raises a ValueError for an empty prompt or a token outside the vocabulary."""
    if not rows or any(len(row) == 0 for row in rows):
        raise ValueError("prompt is empty; want at least one token")
    lowest, highest = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if lowest < 0 or highest >= network.vocab_size:
        raise ValueError(f"prompt tokens must be in [0, {network.vocab_size}): got {lowest} to {highest}")


def count_new_tokens(network: LanguageModel, prompt_length: int, max_new_tokens: int | None) -> int:
    """The number of tokens to generate.

    Raises:
        ValueError: the model has too few positions for the prompt or for all the tokens wanted.
    """
    limit = network.max_length
    check_range(None, "[0, inf)", max_new_tokens=max_new_tokens)
    if limit is None:
        if max_new_tokens is None:
            raise ValueError("the model's positions have no end; want a number of new tokens")
        return max_new_tokens
    if prompt_length > limit:
        raise ValueError(f"prompt of {prompt_length} tokens is longer than the model's max_length={limit}")
    if max_new_tokens is None:
        return limit + 1 - prompt_length
    needed = prompt_length + max_new_tokens - 1
    if needed > limit:
        raise ValueError(f"prompt and new tokens need {needed} positions; the model has max_length={limit}")
    return max_new_tokens


def check_memory(network: LanguageModel, rows: int, positions: int, cache_dtype: torch.dtype | None) -> None:
    """Raises a ValueError that says how large a decoding state would be that does not fit into the memory."""
    weight = network.token_embedding.weight
    dtype = weight.dtype if cache_dtype is None else cache_dtype
    needed, left = rows * network.cache_bytes(positions, dtype), available_bytes(weight.device)
    # A row needs its logits too: with a state of constant size they are what many samples amount to.
    logits = rows * network.vocab_size * torch.float32.itemsize
    if left is not None and needed + logits > left:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"the decoding state of {rows} x {positions:,} positions takes {format_bytes(needed)} in {name}, their "
            f"logits {format_bytes(logits)}; "
            f"{format_bytes(left)} of memory are free: want fewer tokens, fewer samples or a smaller cache dtype"
        )


def prefill(
    network: LanguageModel,
    rows: Sequence[Int[Tensor, " _"]],
    *,
    cache_dtype: torch.dtype | None = None,
    capacity: int = 0,
) -> tuple[Float[Tensor, "B V"], DecodingState]:
    """Logits of the token after each prompt, and the state after it: one parallel pass per length of prompt.

    Nothing is padded, so that a row is computed as it would be alone.
    """
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    logits, layers = [], []
    for indices in by_length.values():
        tokens = torch.stack([rows[index] for index in indices])
        state = network.init_cache(len(indices), cache_dtype=cache_dtype, capacity=capacity)
        x = None
        for part in tokens.split(PREFILL_POSITIONS, dim=1):
            x, state = network.advance(part, state)
        assert x is not None
        logits.append(network.unembed(x[:, -1:])[:, 0])
        layers.append(state.layers)
    device = logits[0].device
    position: int | Tensor = torch.tensor([len(row) for row in rows], device=device)
    if len(by_length) == 1:
        return logits[0], DecodingState(len(rows[0]), layers[0])
    # The row of `logits` and `layers` that each prompt went to.
    order = torch.tensor([i for indices in by_length.values() for i in indices], device=device).argsort()
    return torch.cat(logits)[order], DecodingState(position, select_rows(join_rows(layers), order))


def select(state: DecodingState, rows: Int[Tensor, " N"]) -> DecodingState:
    """The decoding state of the given batch rows, each as often as it is named."""
    position = state.position if isinstance(state.position, int) else state.position[rows]
    return DecodingState(position, select_rows(state.layers, rows))


def sample(
    logits: Float[Tensor, "B V"],
    sampling: Sampling,
    seen: Bool[Tensor, "B V"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " B"]:
    """One token per row; `seen` marks the tokens under the repetition penalty."""
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None:
        ordered, order = probabilities.sort(-1, descending=True)
        # The token that reaches the share still counts.
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(outside.scatter(-1, order, outside), 0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
