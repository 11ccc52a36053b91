"""Benchmark of decoding: checked, then timed against the memory's speed, the whole context, and a Transformer."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Lines, status_bytes
from benchmarks.read_probe import measure_read_bandwidth
from benchmarks.step import plain_formulas
from benchmarks.targets import decode_targets
from causalrn.models import MLP, LanguageModel, LinearRelation, Mixer, QuadraticRelation, SoftmaxAttention
from causalrn.models.cache import GrowingCache, held_bytes
from causalrn.models.decoding import GREEDY, generate
from causalrn.models.language_model import DecodingState
from causalrn.models.positions import LearnedPositions
from causalrn.models.weight_only import StoredLinear, store_weights
from causalrn.system import available_bytes, format_bytes

LINEAR, QUADRATIC, TRANSFORMER = "linear", "quadratic", "Transformer"
VOCABULARY = 256
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Positions that a cache is filled with at a time.
FILL_POSITIONS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d-model", type=int, default=768, help="width C (default: 768)")
    parser.add_argument(
        "--d-hidden", type=int, default=3072, help="channels D of the relations (default: 3072)"
    )
    parser.add_argument("--layers", type=int, default=12, help="layers (default: 12)")
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[256, 4096, 65536],
        help="positions (default: 256 4096 65536)",
    )
    parser.add_argument(
        "--rerun-context", type=int, default=256, help="positions run again per token (default: 256)"
    )
    parser.add_argument(
        "--long-tokens",
        type=int,
        default=100_000,
        help="tokens decoded in one go by the linear form (default: 100000)",
    )
    parser.add_argument(
        "--long-d-model", type=int, default=192, help="width of the model that decodes them (default: 192)"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed steps per figure (default: 20)")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Lines]]:
    """Checks, then times; returns the record and the panels of its plot.

    Raises:
        RuntimeError: a result that is not that of the full forward pass.
    """
    check()
    bandwidth = measure_read_bandwidth(torch.device("cpu"))
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s on {torch.get_num_threads()} threads", flush=True)
    rows = []
    for name in (LINEAR, QUADRATIC, TRANSFORMER):
        network = make_network(name, options)
        rows += [
            row
            for context in options.contexts
            if (row := measure(name, network, context, bandwidth, options))
        ]
    weights = {name: measure_weights(dtype, options) for name, dtype in WEIGHTS.items()}
    rerun = {name: measure_rerun(name, options) for name in (LINEAR, QUADRATIC)}
    record = {
        "benchmark": "decode",
        "d_model": options.d_model,
        "d_hidden": options.d_hidden,
        "layers": options.layers,
        "read_bytes_per_second": bandwidth,
        "steps": rows,
        "linear_tokens_per_second_by_weights": weights,
        "whole_context_per_token": rerun,
        "long": measure_long(options),
    }
    return record | {"targets": decode_targets(record)}, panels(rows)


def check() -> None:
    """Greedy decoding of small models against the whole context run again for every token."""
    torch.manual_seed(0)
    small = argparse.Namespace(d_model=24, d_hidden=40, layers=2)
    for name in (LINEAR, QUADRATIC, TRANSFORMER):
        network = make_network(name, small, max_length=80)
        # Logits far enough apart that rounding decides no token.
        torch.nn.init.normal_(network.head.weight)
        prompts = [torch.randint(VOCABULARY, (length,)) for length in (40, 3)]
        with torch.inference_mode():
            expected = [whole_context_tokens(network, prompt, 30) for prompt in prompts]
            tokens = generate(store_weights(network, torch.float32), prompts, 30, GREEDY)
        if not torch.equal(tokens, torch.stack(expected)):
            raise RuntimeError(f"{name}: decoding gives other tokens than the whole context")
    print("checked: decoding gives the tokens of the whole context", flush=True)


def whole_context_tokens(network: LanguageModel, prompt: Tensor, count: int) -> Tensor:
    """Greedy tokens, the whole context run again for each."""
    context = prompt[None]
    for _ in range(count):
        context = torch.cat([context, network(context)[:, -1:].argmax(-1)], 1)
    return context[0, len(prompt) :]


def make_network(name: str, options: argparse.Namespace, max_length: int = 1) -> LanguageModel:
    """A network of each kind with equal parameters per layer: 3 C D in the relations, 12 C^2 in the Transformer."""
    mixer: Mixer
    mlp = None
    if name == TRANSFORMER:
        heads = max(1, options.d_model // 64)
        mixer, mlp = SoftmaxAttention(options.d_model, heads), MLP(options.d_model, 4 * options.d_model)
    else:
        mixer = (LinearRelation if name == LINEAR else QuadraticRelation)(options.d_model, options.d_hidden)
    return LanguageModel(mixer, VOCABULARY, options.layers, max_length, mlp).eval()


def measure(
    name: str, network: LanguageModel, context: int, bandwidth: float, options: argparse.Namespace
) -> dict[str, Any] | None:
    """Times steps after `context` positions whose states are random: what is in them does not change the time."""
    state_size = network.cache_bytes(context + options.repeats)
    free = available_bytes(torch.device("cpu"))
    if free is not None and state_size > free:
        print(
            f"{name} at {context}: the state takes {format_bytes(state_size)}, {format_bytes(free)} are free"
        )
        return None
    set_positions(network, context + options.repeats + 2)
    store_weights(network, torch.float32)
    state = random_state(network, context, options.repeats + 2)
    seconds = step_seconds(network, state, options.repeats)
    streamed = weight_bytes(network) + (network.cache_bytes(context) if name != LINEAR else 0)
    row = {
        "model": name,
        "context": context,
        "seconds_per_token": seconds,
        "tokens_per_second": 1 / seconds,
        "state_bytes": network.cache_bytes(context),
        "weight_bytes": weight_bytes(network),
        "share_of_streaming_limit": streamed / bandwidth / seconds,
    }
    print(
        f"{name:<12} context {context:<7,} {1 / seconds:8.1f} tokens/s, state {format_bytes(row['state_bytes']):>9}, "
        f"{100 * row['share_of_streaming_limit']:.0f} % of the limit of reading weights and state",
        flush=True,
    )
    return row


def set_positions(network: LanguageModel, count: int) -> None:
    network.max_length = count
    network.position_embedding = LearnedPositions(count, network.d_model)


def random_state(network: LanguageModel, context: int, extra: int) -> DecodingState:
    """The state of `context` random positions, with room for `extra` more."""
    with torch.inference_mode():
        state = network.init_cache(1, capacity=context + extra)
        # A first position gives the caches their shapes, and sums something to be divided by.
        _, state = network.advance(torch.zeros(1, 1, dtype=torch.int64), state)
        for layer in state.layers:
            for cache in layer if isinstance(layer, tuple) else (layer,):
                if isinstance(cache, GrowingCache):
                    fill(cache, context)
    return state._replace(position=context)


def fill(cache: GrowingCache, context: int) -> None:
    assert cache.buffer is not None
    _, heads, _, channels = cache.buffer.shape
    block = torch.randn(1, FILL_POSITIONS, heads, channels)
    while cache.length < context:
        cache.append(block[:, : context - cache.length])


def step_seconds(network: LanguageModel, state: DecodingState, repeats: int) -> float:
    """Median seconds from a token to the logits of the next one."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    times = []
    with torch.inference_mode():
        for _ in range(2 + repeats):
            start = time.perf_counter()
            x, state = network.advance(token, state)
            token = network.unembed(x)[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def weight_bytes(network: LanguageModel) -> int:
    """Bytes of the weights that every token needs: all but the embeddings, of which it needs a row each."""
    layers = (module for module in network.modules() if isinstance(module, StoredLinear))
    return sum(buffer.nbytes for layer in layers for buffer in layer.buffers())


def measure_weights(dtype: torch.dtype, options: argparse.Namespace) -> float:
    """Tokens per second of the linear form with weights held in `dtype`."""
    network = store_weights(make_network(LINEAR, options, options.repeats + 4), dtype)
    rate = 1 / step_seconds(network, random_state(network, 1, 0), options.repeats)
    print(f"linear, weights in {str(dtype).removeprefix('torch.')}: {rate:.1f} tokens/s", flush=True)
    return rate


def measure_rerun(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per token of a step, and of running the whole context again: with our operators, and the official way."""
    context = options.rerun_context
    network = make_network(name, options, context + options.repeats + 4)
    tokens = torch.zeros(1, context, dtype=torch.int64)
    with torch.inference_mode():
        fused = once(lambda: network(tokens))
        with plain_formulas():
            official = once(lambda: network(tokens))
    store_weights(network, torch.float32)
    step = step_seconds(network, random_state(network, context, options.repeats + 2), options.repeats)
    print(
        f"{name}, context {context}: a step takes {1e3 * step:.1f} ms; the whole context {official / step:.0f}x as long "
        f"in plain formulas, {fused / step:.0f}x with the fused operators",
        flush=True,
    )
    return {
        "step_seconds": step,
        "official_seconds": official,
        "fused_seconds": fused,
        "official_ratio": official / step,
        "fused_ratio": fused / step,
    }


def once(call: Callable[[], object]) -> float:
    """The lower of two timings of something that takes long."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_long(options: argparse.Namespace) -> dict[str, Any]:
    """Decodes many tokens in one go: seconds per token and memory early and late."""
    total, width = options.long_tokens, options.long_d_model
    small = argparse.Namespace(d_model=width, d_hidden=4 * width, layers=4)
    network = store_weights(make_network(LINEAR, small, total), torch.float32)
    marks = sorted({min(mark, total) for mark in (100, 1000, 10_000, total)})
    # A window around each mark, wide enough for a steady median.
    window = max(1, min(1000, total // 4))
    state = network.init_cache(1)
    token = torch.zeros(1, 1, dtype=torch.int64)
    times, points = [], []
    with torch.inference_mode():
        for index in range(1, total + 1):
            start = time.perf_counter()
            x, state = network.advance(token, state)
            token = network.unembed(x)[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
            if index in marks:
                points.append((index, held_bytes(state.layers), status_bytes("VmRSS")))
    rows = []
    for index, size, resident in points:
        # The first mark has fewer tokens before it than a window: those after it count as well.
        seconds = statistics.median(times[max(0, index - window) : max(index, window)])
        rows.append({"token": index, "seconds": seconds, "state_bytes": size, "resident_bytes": resident})
        print(
            f"linear, C {width}: token {index:<8,} {1e6 * seconds:8.1f} us, state {format_bytes(size)}, "
            f"resident {format_bytes(resident)}",
            flush=True,
        )
    return {
        "d_model": width,
        "layers": 4,
        "tokens": rows,
        "time_ratio": rows[-1]["seconds"] / rows[0]["seconds"],
    }


def panels(rows: list[dict[str, Any]]) -> dict[str, Lines]:
    """Speed and state over the context, a line per model."""
    drawn: dict[str, Lines] = {}
    for label, key in (("tokens per second", "tokens_per_second"), ("state [byte]", "state_bytes")):
        drawn[label] = {
            name: (
                [row["context"] for row in rows if row["model"] == name],
                [row[key] for row in rows if row["model"] == name],
            )
            for name in (LINEAR, QUADRATIC, TRANSFORMER)
        }
    return drawn
