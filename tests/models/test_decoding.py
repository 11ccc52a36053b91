"""Generation equals re-running the whole context per token, for every mixer and row, and refuses what it cannot do."""

import pytest
import torch
from torch.testing import assert_close

from causalrn.models import (
    MLP,
    LanguageModel,
    LinearAttention,
    LinearRelation,
    QuadraticRelation,
    QuadraticRelationScaledHeads,
    SoftmaxAttention,
    decoding,
)
from causalrn.models.cache import held_bytes
from causalrn.models.decoding import GREEDY, Sampling, generate, prefill, sample, stream

MIXERS = {
    "quadratic": lambda: QuadraticRelation(8, 12, n_heads=2),
    "quadratic approx": lambda: QuadraticRelation(8, 12, pre_norm="approx", activation="gelu"),
    "quadratic scaled heads": lambda: QuadraticRelationScaledHeads(8, 12, n_heads=2, eps=1e-2),
    "linear": lambda: LinearRelation(8, 12),
    "softmax attention": lambda: SoftmaxAttention(8, n_heads=2),
    "linear attention": lambda: LinearAttention(8, n_heads=2),
}


@pytest.fixture(params=MIXERS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    mixer = MIXERS[request.param]()
    mlp = MLP(8, 16) if isinstance(mixer, SoftmaxAttention) else None
    model = LanguageModel(mixer, vocab_size=11, n_layers=2, max_length=40, mlp=mlp).eval()
    # Logits far enough apart that rounding decides no token.
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def quadratic() -> LanguageModel:
    return LanguageModel(QuadraticRelation(8, 12), vocab_size=11, n_layers=2, max_length=16).eval()


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(11, (length,)) for length in lengths]


def rerun(model: LanguageModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The official way: the whole context again for every token."""
    context = prompt[None]
    with torch.no_grad():
        for _ in range(count):
            context = torch.cat([context, model(context)[:, -1:].argmax(-1)], 1)
    return context[0, len(prompt) :]


@pytest.mark.slow
def test_greedy_equals_rerunning_the_context(model: LanguageModel, poisoned_empty: None) -> None:
    # Lengths that repeat, in no order, and a cache that must grow.
    prompts = prompts_of(7, 3, 1, 7, 20, 3)
    tokens = generate(model, prompts, 20, GREEDY)
    for prompt, row in zip(prompts, tokens, strict=True):
        assert torch.equal(row, rerun(model, prompt, 20))


def test_every_logit_equals_the_full_forward(model: LanguageModel) -> None:
    prompts = prompts_of(2, 9, 5)
    rows = torch.stack([torch.cat([prompt, torch.randint(11, (12 - len(prompt),))]) for prompt in prompts])
    with torch.inference_mode():
        expected = model(rows)
        logits, state = prefill(model, prompts)
        for b, prompt in enumerate(prompts):
            assert_close(logits[b], expected[b, len(prompt) - 1], atol=1e-5, rtol=1e-5)
        for step in range(3):
            tokens = torch.stack([rows[b, len(prompt) + step] for b, prompt in enumerate(prompts)])
            logits, state = model.extend(tokens[:, None], state)
            for b, prompt in enumerate(prompts):
                assert_close(logits[b, 0], expected[b, len(prompt) + step], atol=1e-5, rtol=1e-5)


def test_prefill_in_parts_equals_the_whole(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(23, 23)
    whole, _ = prefill(model, prompts)
    monkeypatch.setattr(decoding, "PREFILL_POSITIONS", 5)
    assert_close(prefill(model, prompts)[0], whole, atol=1e-5, rtol=1e-5)


def test_samples_share_the_prompt(model: LanguageModel) -> None:
    prompts = prompts_of(4, 6)
    sampling = Sampling(0, repetition_penalty=1.3)
    tokens = generate(model, prompts, 10, sampling, samples=3)
    alone = generate(model, prompts, 10, sampling)
    assert torch.equal(tokens, alone.repeat_interleave(3, 0))


def test_reported_state_is_what_is_held(model: LanguageModel) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            _, state = prefill(model, prompts_of(9, 9), cache_dtype=dtype, capacity=30)
        assert held_bytes(state.layers) == 2 * model.cache_bytes(9, dtype)


def test_cache_in_bfloat16_decodes_close_to_float32(quadratic: LanguageModel) -> None:
    prompts = prompts_of(9, 4)
    with torch.inference_mode():
        exact, _ = prefill(quadratic, prompts)
        rounded, state = prefill(quadratic, prompts, cache_dtype=torch.bfloat16)
        assert state.layers[0].buffer.dtype is torch.bfloat16
        assert rounded.dtype is torch.float32
    assert_close(rounded, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(rounded, exact)


def test_stop_tokens_end_a_row(quadratic: LanguageModel) -> None:
    prompts = prompts_of(3, 5)
    free = generate(quadratic, prompts, 11, GREEDY)
    stop = int(free[0, 2])
    tokens = generate(quadratic, prompts, 11, GREEDY, stop_tokens=[stop])
    for row, free_row in zip(tokens, free, strict=True):
        end = free_row.tolist().index(stop) if stop in free_row else len(row)
        assert torch.equal(row[: end + 1], free_row[: end + 1][: len(row)])
        assert (row[end:] == stop).all()
    one = generate(quadratic, prompts[:1], 11, GREEDY, stop_tokens=[stop])
    assert one.shape[1] == free[0].tolist().index(stop) + 1


def test_without_a_limit_the_positions_are_used_up(quadratic: LanguageModel) -> None:
    assert generate(quadratic, prompts_of(10), None, GREEDY).shape == (1, 7)
    assert generate(quadratic, prompts_of(16), None, GREEDY).shape == (1, 1)
    assert generate(quadratic, prompts_of(16), 0, GREEDY).shape == (1, 0)


def test_sampling_is_reproducible(quadratic: LanguageModel) -> None:
    prompt = torch.randint(11, (2, 4))
    draws = [
        generate(quadratic, prompt, 8, Sampling(top_k=3), generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def drawn_tokens(logits: list[float], seen: list[bool] | None = None, **settings) -> dict[int, float]:
    """Share of each token in many draws."""
    n = 4000
    marks = None if seen is None else torch.tensor(seen).expand(n, -1)
    tokens = sample(torch.tensor(logits).expand(n, -1), Sampling(**settings), marks)
    return {int(token): float((tokens == token).float().mean()) for token in tokens.unique()}


def test_distribution_of_draws() -> None:
    probabilities = [0.5, 0.25, 0.15, 0.1]
    logits = torch.tensor(probabilities).log().tolist()
    # Four standard errors of a share near 0.5.
    close = {"abs": 4 * 0.5 / 4000**0.5}
    assert drawn_tokens(logits) == pytest.approx(dict(enumerate(probabilities)), **close)
    assert drawn_tokens(logits, top_k=2) == pytest.approx({0: 2 / 3, 1: 1 / 3}, **close)
    assert drawn_tokens(logits, top_p=0.5) == {0: 1.0}
    assert drawn_tokens(logits, top_p=0.51) == pytest.approx({0: 2 / 3, 1: 1 / 3}, **close)
    assert drawn_tokens(logits, top_p=1.0).keys() == {0, 1, 2, 3}
    squared = torch.tensor(probabilities).square()
    assert drawn_tokens(logits, temperature=0.5) == pytest.approx(
        dict(enumerate((squared / squared.sum()).tolist())), **close
    )
    assert drawn_tokens(logits, temperature=0) == {0: 1.0}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    assert drawn_tokens([2.0, 1.9, -9.0], [True, False, False], temperature=0, repetition_penalty=1.1) == {
        1: 1.0
    }
    assert drawn_tokens([-2.0, -2.1, -9.0], [True, False, False], temperature=0, repetition_penalty=1.1) == {
        1: 1.0
    }


def test_repetition_penalty_counts_prompt_and_text(quadratic: LanguageModel) -> None:
    context = torch.tensor([[3, 4]])
    tokens = generate(quadratic, context, 12, Sampling(0, repetition_penalty=1.5))[0]
    for token in tokens:
        logits = quadratic(context)[0, -1]
        logits = torch.tensor(
            [
                value if index not in context else value / 1.5 if value > 0 else value * 1.5
                for index, value in enumerate(logits.tolist())
            ]
        )
        assert token == logits.argmax()
        context = torch.cat([context, token[None, None]], 1)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "empty"),
        ([], {}, "empty"),
        (torch.tensor([[11]]), {}, r"\[0, 11\)"),
        (torch.tensor([[-1]]), {}, r"\[0, 11\).*-1"),
        (torch.zeros(1, 10, dtype=torch.int64), {"max_new_tokens": 8}, "17 positions.*max_length=16"),
        (torch.zeros(1, 17, dtype=torch.int64), {"max_new_tokens": None}, "17 tokens.*max_length=16"),
        (torch.tensor([[1]]), {"max_new_tokens": -1}, "max_new_tokens.*-1"),
        (torch.tensor([[1]]), {"samples": 0}, "samples.*0"),
    ],
)
def test_mistakes_are_named_before_the_first_token(
    quadratic: LanguageModel, prompt: torch.Tensor, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stream(quadratic, prompt, **{"max_new_tokens": 1, "sampling": GREEDY, **options})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature.*-1.0"),
        ({"top_k": 0}, "top_k.*0"),
        ({"top_p": 1.5}, "top_p.*1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty.*0.0"),
    ],
)
def test_draws_out_of_range_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_a_cache_larger_than_memory_is_refused_with_its_size(
    quadratic: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = torch.zeros(1, 4, dtype=torch.int64)
    # 11 logits a row.
    needed = 1000 * (quadratic.cache_bytes(16) + 4 * 11)
    monkeypatch.setattr(decoding, "available_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"1000 x 16 .* 1.5 MB in float32, their logits 44.0 kB; 1.6 MB"):
        stream(quadratic, prompt, 13, GREEDY, samples=1000)
    generate(quadratic, prompt, 13, GREEDY, samples=1000, cache_dtype=torch.bfloat16)
