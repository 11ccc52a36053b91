"""Runs tasks of lm-evaluation-harness on a checkpoint; imported only where lm_eval is installed."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from causalrn.evaluation.codec import Codec, TextCodec, TextStream
from causalrn.models import LanguageModel
from causalrn.models.decoding import Sampling, stream

# New tokens where a task gives no number: the harness's own default for Hugging Face models.
DEFAULT_NEW_TOKENS = 256
# The longest input of a model whose positions have no end.
DEFAULT_CONTEXT = 4096
# (context and continuation as text, their tokens); only the tokens are used here, and the first entry may be None.
TokenRequest = tuple[Any, list[int], list[int]]
Item = TypeVar("Item")


class SplitPair(NamedTuple):
    """Tokens of a context and its continuation.

    Attributes:
        before: read, not scored.
        scored: scored after them.
        alone: scored instead where the context stands alone; empty unless the continuation has no tokens of its own.
    """

    before: list[int]
    scored: list[int]
    alone: list[int]


class CheckpointLM(TemplateLM):
    """A network and its tokenizer as a model of the harness.

    Context and continuation are encoded together and parted as by the harness's own causal models: the tokens of both, less as
    many as the context alone has, are scored after those of the context. Where a continuation merges with the end of the
    context so that none are left, the harness would score nothing, as a certainty. Its likelihood is then that of both
    texts divided by that of the context, which is what tokens of its own would give.

    An empty context is the token that ends a document. Contexts that are longer than the model's positions lose their
    beginning.

    Args:
        network: in evaluation mode.
        codec: of the text that the network was trained on.
        batch_size: sequences per forward pass.

    Raises:
        ValueError: the network was not trained on text.
    """

    def __init__(self, network: LanguageModel, codec: Codec, batch_size: int) -> None:
        super().__init__()
        if not isinstance(codec, TextCodec):
            raise ValueError("--tasks are about text: want a checkpoint that was trained on text")
        self.network = network
        self.codec = codec
        self.batch_size = batch_size
        self.max_length = network.max_length or DEFAULT_CONTEXT
        self._device = network.token_embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.codec.stop_tokens[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.codec.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation given its context, and whether it is the most likely one.

        Raises:
            ValueError: a continuation has no tokens, so that nothing could be scored.
        """
        splits = [self.split_pair(*request.args) for request in requests]
        scored = self._loglikelihood_tokens([(None, split.before, split.scored) for split in splits])
        merged = [index for index, split in enumerate(splits) if split.alone]
        alone = self._loglikelihood_tokens(
            [(None, splits[index].before, splits[index].alone) for index in merged]
        )
        for index, (likelihood, _) in zip(merged, alone, strict=True):
            scored[index] = (scored[index][0] - likelihood, scored[index][1])
        return scored

    def split_pair(self, context: str, continuation: str) -> SplitPair:
        """Tokens of a context and its continuation. Spaces at the end of the context belong to the continuation, as in
        the harness: words are spelled with the space before them.

        Raises:
            ValueError: the continuation has no tokens.
        """
        if context:
            before, scored = self._encode_pair(context, continuation)
        else:
            before, scored = [], self.tok_encode(continuation)
        if scored:
            return SplitPair(before, scored, [])
        both = self.tok_encode(context + continuation)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(both, before, strict=False))
        shared = len(list(same))
        if len(both) == shared:
            raise ValueError(
                f"a task asks for the likelihood of {continuation!r} after {context[-40:]!r}, which adds no token: want "
                "a continuation that is not empty"
            )
        return SplitPair(both[:shared], both[shared:], before[shared:])

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: dict[int, tuple[float, bool]] = {}
        # Neighbours of like length, so that little is padded.
        order = sorted(
            range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2])
        )
        for batch in split(order, self.batch_size):
            rows = [self.input_row(*requests[index][1:]) for index in batch]
            width = max(len(row) for row in rows)
            # Padding on the right, where no earlier position sees it.
            tokens = torch.zeros(len(rows), width, dtype=torch.int64, device=self._device)
            for row, values in zip(tokens, rows, strict=True):
                row[: len(values)] = torch.tensor(values)
            likelihoods = self.network(tokens).float().log_softmax(-1)
            for index, values, row in zip(batch, rows, likelihoods, strict=True):
                targets = torch.tensor(requests[index][2], device=self._device)
                scored = row[len(values) - len(targets) : len(values)]
                likelihood = scored.gather(1, targets[:, None]).sum()
                results[index] = (float(likelihood), bool((scored.argmax(-1) == targets).all()))
        return [results[index] for index in range(len(requests))]

    def input_row(self, context: list[int], continuation: list[int]) -> list[int]:
        """The network's input: the end of the context, and the continuation but for its last token.

        Raises:
            ValueError: the continuation alone has too many tokens, or none.
        """
        limit = self.max_length
        if not continuation:
            raise ValueError("a continuation has no tokens: nothing can be scored")
        if len(continuation) > limit:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than the model's max_length={limit}"
            )
        return [*(context or [self.eot_token_id]), *continuation][-limit - 1 : -1]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each text after the token that ends a document; 0 for a text without any token."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum((likelihood for likelihood, _ in scored), 0.0))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = []
        # Each is (context, settings).
        arguments: list[Any] = [request.args for request in requests]
        # One call decodes prompts of any lengths, but with the same settings.
        for _, group in itertools.groupby(arguments, key=lambda pair: json.dumps(pair[1])):
            for batch in split(list(group), self.batch_size):
                texts += self.generate([context for context, _ in batch], batch[0][1])
        return texts

    def generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Continuations that end before the first of the stop strings in `settings["until"]`."""
        count = min(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS), self.max_length)
        # Room for the new tokens, the last of which needs no position.
        room = max(1, self.max_length + 1 - count)
        prompts = [
            torch.tensor((self.tok_encode(text) or [self.eot_token_id])[-room:], device=self._device)
            for text in contexts
        ]
        until = settings.get("until", [])
        stops = [until] if isinstance(until, str) else until
        streams = [TextStream(self.codec, stops, prompt.tolist()) for prompt in prompts]
        pieces = [""] * len(contexts)
        for step in stream(
            self.network,
            prompts,
            count,
            Sampling(
                temperature=settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0,
                top_k=settings.get("top_k"),
                top_p=settings.get("top_p"),
            ),
            stop_tokens=self.codec.stop_tokens,
        ):
            for index, token in enumerate(step.tolist()):
                if not streams[index].stopped:
                    pieces[index] += streams[index].add(token)
            if all(text.stopped for text in streams):
                break
        return [piece + text.finish() for piece, text in zip(pieces, streams, strict=True)]


def split(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive parts of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def evaluate_tasks(
    network: LanguageModel,
    codec: Codec,
    tasks: Iterable[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, float]:
    """Metrics by METRIC/TASK.

    Args:
        network: in evaluation mode.
        codec: of the text that the network was trained on.
        tasks: names that the harness, or a YAML file in `include_path`, knows.
        include_path: folder of further tasks.
        num_fewshot: examples in each context; as the task says if None.
        limit: samples of each task; all if None.
        batch_size: sequences per forward pass.

    Raises:
        ValueError: an unknown task, or a network that was not trained on text.
    """
    model = CheckpointLM(network, codec, batch_size)
    manager = TaskManager(include_path=include_path)
    names = list(tasks)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown)}; want --include-path FOLDER for own ones"
        )
    found = simple_evaluate(
        model=model,
        tasks=[*names],
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    assert found is not None
    return {
        f"{metric.removesuffix(',none')}/{task}": float(value)
        for task, values in found.get("results", {}).items()
        for metric, value in values.items()
        if isinstance(value, int | float) and "stderr" not in metric and "," in metric
    }
