"""Memory and traffic of a training step on paper: `python -m benchmarks.memory_model` prints the tables of docs/scaling.md."""

from collections.abc import Callable
from dataclasses import dataclass, replace

FLOAT, HALF = 4, 2
# Of a GPU's 80 GB: what the driver, NCCL and the allocator's gaps leave.
USABLE_BYTES = 0.9 * 80e9
STRATEGIES = ("one", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# As in causalrn.training.strategies.ZeroStrategy; two buckets travel while the next fills.
BUCKET_ELEMENTS, BUCKETS = 200_000_000, 2
# DeepSpeed's own limit on parameters that stage 3 keeps gathered.
LIVE_ELEMENTS = 1_000_000_000


@dataclass(frozen=True)
class Shape:
    """A CausalRN: width C, channels D, layers, vocabulary V, context T (with as many learned positions)."""

    d_model: int
    d_hidden: int
    n_layers: int
    vocab_size: int = 50_304
    context: int = 2048

    @property
    def layer_parameters(self) -> int:
        return 3 * self.d_model * self.d_hidden + self.d_hidden + self.d_model

    @property
    def embedding_parameters(self) -> int:
        """Token and position embeddings, and the head."""
        return (2 * self.vocab_size + self.context) * self.d_model

    @property
    def parameters(self) -> int:
        return self.n_layers * self.layer_parameters + self.embedding_parameters


@dataclass(frozen=True)
class Bytes:
    """Bytes on one device, and in host memory per device where something is offloaded."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float = 0.0
    host: float = 0.0

    @property
    def device(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def state_bytes(shape: Shape, strategy: str, ranks: int, mixed: bool) -> Bytes:
    """What a device holds besides activations: float32 parameters and AdamW under every strategy.

    Mixed precision is autocast, which keeps a bfloat16 copy of each weight matrix until its backward pass; FSDP gathers
    in bfloat16 instead.
    """
    whole = FLOAT * shape.parameters
    part = whole / ranks
    matrices = shape.n_layers * 3 * shape.d_model * shape.d_hidden + shape.vocab_size * shape.d_model
    copies = HALF * matrices if mixed else 0
    bucket = BUCKETS * FLOAT * min(BUCKET_ELEMENTS, shape.parameters)
    live = FLOAT * min(LIVE_ELEMENTS, shape.parameters)
    if strategy == "one":
        return Bytes(whole, whole, 2 * whole, copies)
    if strategy == "ddp":
        # The reducer's buckets are a second copy of the gradients.
        return Bytes(whole, whole, 2 * whole, copies + whole)
    if strategy == "fsdp":
        # Two blocks are gathered, one computing and the next arriving, with one block's whole gradient; embeddings and
        # head, the outermost group, stay.
        block = shape.layer_parameters * (2 * (HALF if mixed else FLOAT) + FLOAT)
        return Bytes(part, part, 2 * part, block + 2 * FLOAT * shape.embedding_parameters)
    # ZeRO's optimizer steps on float32 copies of its part.
    if strategy == "zero1":
        return Bytes(whole, whole, 3 * part, copies + bucket)
    if strategy == "zero2":
        return Bytes(whole, part, 3 * part, copies + bucket)
    if strategy == "zero2_offload":
        return Bytes(whole, 0, 0, copies + bucket, host=4 * part)
    if strategy == "zero3":
        return Bytes(part, part, 3 * part, copies + bucket + live)
    assert strategy == "zero3_offload", strategy
    return Bytes(0, 0, 0, copies + bucket + live, host=5 * part)


def activation_bytes(shape: Shape, tokens: int, mixed: bool) -> float:
    """What the backward pass needs of `tokens` positions, and the most that is computed with at once.

    A layer keeps its normalised input (C) and q, k and the normalised sum (3 D); quadratic and linear form alike.
    Mixed precision holds all but the first in bfloat16, and casts the input once for q and once for k.
    """
    c, d, v = shape.d_model, shape.d_hidden, shape.vocab_size
    layer = (FLOAT + 2 * HALF) * c + 3 * HALF * d if mixed else FLOAT * (c + 3 * d)
    head = (FLOAT + HALF) * c if mixed else FLOAT * c
    # The loss holds log-probabilities and their gradient; a layer's backward pass q, k, the sum and their gradients.
    work = max(2 * FLOAT * v + (HALF * v if mixed else 0), 6 * FLOAT * d)
    return tokens * (shape.n_layers * layer + head + work)


def pool_bytes(shape: Shape, form: str) -> float:
    """What decoding keeps of one sequence: k of every position in bfloat16, or one float32 sum per layer."""
    if form == "quadratic":
        return HALF * shape.context * shape.d_hidden * shape.n_layers
    return FLOAT * (shape.d_hidden + 1) * shape.n_layers


def traffic_bytes(shape: Shape, strategy: str, ranks: int, mixed: bool, accumulated: int = 1) -> float:
    """Bytes that each device sends in an optimizer step of `accumulated` batches, over rings."""
    whole = FLOAT * shape.parameters
    gathered = HALF * shape.n_layers * shape.layer_parameters + FLOAT * shape.embedding_parameters
    share = (ranks - 1) / ranks
    # What is partitioned by the time of its gradient is reduced for every batch.
    reduces = {"ddp": 1, "zero1": 1}.get(strategy, accumulated)
    if strategy == "one":
        return 0.0
    if strategy == "fsdp":
        return share * accumulated * (2 * (gathered if mixed else whole) + whole)
    if strategy.startswith("zero3"):
        return share * whole * 3 * accumulated
    return share * whole * (1 + reduces)


def fits(shape: Shape, strategy: str, ranks: int, split: int = 1) -> bool:
    """Whether one sequence per device, or over `split` of them, trains in mixed precision on 80 GB."""
    activations = activation_bytes(shape, -(-shape.context // split), mixed=True)
    return state_bytes(shape, strategy, ranks, mixed=True).device + activations <= USABLE_BYTES


def largest(candidates: list[Shape], strategy: str, ranks: int, split: int = 1) -> Shape | None:
    """The last of growing shapes that fits."""
    return max(
        (shape for shape in candidates if fits(shape, strategy, ranks, split)),
        key=lambda shape: (shape.context, shape.parameters),
        default=None,
    )


# Hidden channels are 4 C, as in the paper's text models.
SIZES = {
    "85M": Shape(768, 3072, 12),
    "300M": Shape(1024, 4096, 24),
    "1.2B": Shape(2048, 8192, 24),
    "2.5B": Shape(2560, 10240, 32),
    "7B": Shape(4096, 16384, 32),
}
CONTEXTS = (2048, 16_384, 131_072, 1_048_576)
RANKS = 8


def giga(count: float) -> str:
    """10^9 bytes, with three digits."""
    return f"{count / 1e9:.3g}" if count < 1e12 else f"{count / 1e9:.0f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_size(head: str, cell: Callable[[Shape, str], str], strategies: tuple[str, ...]) -> str:
    rows = [[name, *(cell(shape, name) for shape in SIZES.values())] for name in strategies]
    return table([head, *SIZES], rows)


def longest_context(shape: Shape, strategy: str, split: int = 1) -> str:
    candidates = [replace(shape, context=1024 * count) for count in range(1, 1025)]
    found = largest(candidates, strategy, RANKS, split)
    return "-" if found is None else f"{found.context // 1024}k" if found.context < 2**20 else "1M or more"


def largest_model(strategy: str, context: int) -> str:
    candidates = [Shape(128 * n, 512 * n, n, context=context) for n in range(4, 257)]
    found = largest(candidates, strategy, RANKS)
    return "-" if found is None else f"{found.parameters / 1e9:.1f}B"


def tables() -> str:
    """All tables of docs/scaling.md."""
    contexts = [f"{context // 1024}k" if context < 2**20 else "1M" for context in CONTEXTS]
    parts = [
        "Parameters, with embeddings of 50,304 tokens and 2,048 positions, and of them in the layers:",
        table(
            ["", *SIZES],
            [
                ["all, 10^9", *(f"{shape.parameters / 1e9:.2f}" for shape in SIZES.values())],
                [
                    "layers, 10^9",
                    *(f"{shape.n_layers * shape.layer_parameters / 1e9:.3f}" for shape in SIZES.values()),
                ],
                ["C, D", *(f"{shape.d_model}, {shape.d_hidden}" for shape in SIZES.values())],
                ["layers", *(str(shape.n_layers) for shape in SIZES.values())],
            ],
        ),
        f"Parameters + gradients + optimizer + buffers on each of {RANKS} GPUs, mixed precision, GB (10^9 bytes):",
        by_size("strategy", lambda s, n: giga(state_bytes(s, n, RANKS, True).device), STRATEGIES),
        f"The same, part by part, for 7B (host memory is per GPU; times {RANKS} per node):",
        table(
            ["strategy", "parameters", "gradients", "optimizer", "buffers", "host"],
            [
                [name, *map(giga, (b.parameters, b.gradients, b.optimizer, b.buffers, b.host))]
                for name in STRATEGIES
                for b in [state_bytes(SIZES["7B"], name, RANKS, True)]
            ],
        ),
        "Activations of one sequence in mixed precision, GB, by its length:",
        table(
            ["length", *SIZES],
            [
                [label, *(giga(activation_bytes(shape, context, True)) for shape in SIZES.values())]
                for label, context in zip(contexts, CONTEXTS, strict=True)
            ],
        ),
        "Learned positions alone, GB of parameters, gradients and AdamW on one GPU (16 bytes each):",
        table(
            ["length", *SIZES],
            [
                [label, *(giga(16 * context * shape.d_model) for shape in SIZES.values())]
                for label, context in zip(contexts, CONTEXTS, strict=True)
            ],
        ),
        "What decoding one sequence keeps, GB: the quadratic form's cache of k in bfloat16, by length, and the linear form's state:",
        table(
            ["", *SIZES],
            [
                *(
                    [
                        f"quadratic, {label}",
                        *(giga(pool_bytes(replace(s, context=context), "quadratic")) for s in SIZES.values()),
                    ]
                    for label, context in zip(contexts, CONTEXTS, strict=True)
                ),
                ["linear, any", *(giga(pool_bytes(s, "linear")) for s in SIZES.values())],
            ],
        ),
        f"Sent by each of {RANKS} GPUs per optimizer step, GB, mixed precision, one batch per step / four accumulated:",
        by_size(
            "strategy",
            lambda s, n: (
                f"{giga(traffic_bytes(s, n, RANKS, True))} / {giga(traffic_bytes(s, n, RANKS, True, 4))}"
            ),
            STRATEGIES[1:],
        ),
        "Longest context on 8 x 80 GB with one sequence per GPU, and with one sequence over all 8 (linear form, weights replicated):",
        table(
            ["strategy", *SIZES],
            [
                *([name, *(longest_context(s, name) for s in SIZES.values())] for name in STRATEGIES[1:]),
                ["context_parallel", *(longest_context(s, "ddp", RANKS) for s in SIZES.values())],
            ],
        ),
        "Largest model on 8 x 80 GB (D = 4 C, one layer per 128 channels of C), one sequence per GPU:",
        table(
            ["strategy", "context 2k", "context 16k"],
            [[name, largest_model(name, 2048), largest_model(name, 16_384)] for name in STRATEGIES[1:]],
        ),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables())
