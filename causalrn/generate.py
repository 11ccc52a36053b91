"""Continues a prompt with a trained model: `python -m causalrn.generate --checkpoint PATH --prompt "..."`."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from causalrn.cli import Parser, add_checkpoint, quiet_libraries
from causalrn.evaluation.codec import Codec, NumberCodec, TextStream, codec_of
from causalrn.models import LanguageModel
from causalrn.models.decoding import Sampling, stream
from causalrn.models.weight_only import store_weights
from causalrn.system import check_options, format_bytes
from causalrn.training.checkpoint import named_checkpoint, network_from, read_checkpoint
from causalrn.training.errors import run_command

WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(args: list[str] | None = None) -> None:
    options = make_parser().parse_args(args)
    # `Sampling` checks the same values; here the message has the flag as it was typed, before anything is read.
    check_options(options, "[0, inf)", "max_tokens", "temperature")
    check_options(options, "[1, inf)", "top_k", "samples")
    check_options(options, "(0, 1]", "top_p")
    check_options(options, "(0, inf)", "repetition_penalty")
    options.checkpoint = named_checkpoint(options.checkpoint)
    quiet_libraries()
    # A terminal that is not set to UTF-8 would stop at the first other character.
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(encoding="utf-8", errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    device = choose_device(options.device)
    prompts = read_prompts(options)
    checkpoint = read_checkpoint(options.checkpoint)
    network = network_from(checkpoint, options.checkpoint)
    codec = NumberCodec(network.vocab_size) if options.ids else codec_of(checkpoint)
    network = store_weights(network, WEIGHT_DTYPES[options.weights])
    network = network.to(device)
    if prompts:
        answer(network, codec, prompts, options)
    else:
        for prompt in typed_prompts():
            try:
                answer(network, codec, [prompt], options)
            except ValueError as error:
                # The next line may be a better one.
                print(f"error: {error}", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m causalrn.generate", description=__doc__)
    add_checkpoint(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        action="append",
        help="text to continue (copy task: letters to copy); may be given again for a batch; without any, each line "
        "typed on the terminal is one",
    )
    prompt.add_argument(
        "--prompt-file", type=Path, help="UTF-8 file that holds the prompt; - is the standard input"
    )
    parser.add_argument(
        "--ids", action="store_true", help="prompt and answer are token ids, as in '0 7 12 1'"
    )
    parser.add_argument(
        "--max-tokens", type=int, help="tokens to generate (default: all positions of the model)"
    )
    parser.add_argument(
        "--temperature", type=float, help="0 is greedy (default: 0.8; tasks with one answer: 0)"
    )
    parser.add_argument("--greedy", action="store_true", help="always the most likely token: --temperature 0")
    parser.add_argument("--top-k", type=int, help="draw among the k most likely tokens only")
    parser.add_argument("--top-p", type=float, help="draw among the fewest tokens that hold this probability")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1 repeats less (default: 1)"
    )
    parser.add_argument("--samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; may repeat"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHT_DTYPES,
        default="float32",
        help="what weights are held in (default: float32)",
    )
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="of the positions kept (default: float32)"
    )
    # Its former name.
    parser.add_argument(
        "--pool-dtype",
        dest="cache_dtype",
        choices=CACHE_DTYPES,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return parser


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts that the command names; none means that they are typed.

    Raises:
        ValueError: none is named and nobody is there to type, or the file is not UTF-8.
    """
    if options.prompt_file is not None:
        raw = sys.stdin.buffer.read() if str(options.prompt_file) == "-" else options.prompt_file.read_bytes()
        try:
            return [raw.decode()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt-file {options.prompt_file} is not UTF-8: {error}") from None
    if not options.prompt and not sys.stdin.isatty():
        raise ValueError("no prompt; want --prompt TEXT, --prompt-file FILE, or a terminal to type at")
    return options.prompt or []


def choose_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one.

    Raises:
        ValueError: this machine or this PyTorch has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).partition(chr(10))[0]}") from None
    return device


def typed_prompts() -> Iterator[str]:
    """Lines typed on the terminal, until end of file."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line:
            yield line


def answer(network: LanguageModel, codec: Codec, prompts: list[str], options: argparse.Namespace) -> None:
    """Prints the continuations as their tokens come, then the speed and the size of the state."""
    device = network.token_embedding.weight.device
    rows = [torch.tensor(codec.encode(prompt), dtype=torch.int64, device=device) for prompt in prompts]
    temperature = codec.default_temperature if options.temperature is None else options.temperature
    cache_dtype = CACHE_DTYPES.get(options.cache_dtype)
    tokens = stream(
        network,
        rows,
        options.max_tokens,
        Sampling(
            temperature=0.0 if options.greedy else temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
        ),
        samples=options.samples,
        stop_tokens=codec.stop_tokens,
        cache_dtype=cache_dtype,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    texts = [TextStream(codec, options.stop, row.tolist()) for row in rows for _ in range(options.samples)]
    printer = Printer(len(texts), options.samples)
    clock = Clock()
    try:
        run(tokens, texts, printer, codec, clock)
    finally:
        # After Ctrl-C, too, the text that has come is kept.
        for index, text in enumerate(texts):
            printer.add(index, text.finish())
        printer.close()
        longest = max(len(row) for row in rows) + max(clock.steps - 1, 0)
        dtype = network.token_embedding.weight.dtype if cache_dtype is None else cache_dtype
        size = len(texts) * network.cache_bytes(longest, dtype)
        read = sum(len(row) for row in rows)
        print(
            f"{clock.report(read, len(texts))}, state {size:,} bytes ({format_bytes(size)})", file=sys.stderr
        )


def run(
    tokens: Iterator[Tensor], texts: list[TextStream], printer: "Printer", codec: Codec, clock: "Clock"
) -> None:
    ended = [False] * len(texts)
    for step in tokens:
        clock.tick()
        for index, token in enumerate(step.tolist()):
            if ended[index]:
                continue
            printer.add(index, texts[index].add(token))
            ended[index] = texts[index].stopped or token in codec.stop_tokens
            if ended[index]:
                printer.add(index, texts[index].finish())
        printer.show(ended)
        if all(ended):
            return


class Printer:
    """Writes one row after the other: the first unfinished one as it comes, those after it when it is their turn.

    Args:
        rows: number of rows.
        samples: rows of the same prompt; several rows get a heading each.
    """

    def __init__(self, rows: int, samples: int) -> None:
        self.waiting = [""] * rows
        self.samples = samples
        self.current = 0
        self.headed = -1

    def add(self, row: int, text: str) -> None:
        self.waiting[row] += text

    def show(self, ended: list[bool]) -> None:
        """Writes what may be written now."""
        while self.current < len(self.waiting):
            self.write()
            if not ended[self.current] or self.current + 1 == len(self.waiting):
                return
            self.current += 1

    def write(self) -> None:
        if len(self.waiting) > 1 and self.headed < self.current:
            prompt, sample = divmod(self.current, self.samples)
            sys.stdout.write(
                f"{chr(10) if self.current else ''}=== prompt {prompt + 1}, sample {sample + 1}\n"
            )
            self.headed = self.current
        sys.stdout.write(self.waiting[self.current])
        sys.stdout.flush()
        self.waiting[self.current] = ""

    def close(self) -> None:
        """Writes all that is left, and ends the line."""
        self.show([True] * len(self.waiting))
        print(flush=True)


class Clock:
    """Counts steps; the first token comes at the end of the prompt's pass, which is timed apart."""

    def __init__(self) -> None:
        self.steps = 0
        self.start = self.first = self.last = time.perf_counter()

    def tick(self) -> None:
        self.last = time.perf_counter()
        if self.steps == 0:
            self.first = self.last
        self.steps += 1

    def report(self, prompt_tokens: int, rows: int) -> str:
        """The tokens of all rows and their rate, from the first one on."""
        rate = rows * (self.steps - 1) / (self.last - self.first) if self.steps > 1 else 0.0
        prompt = f"prompt of {prompt_tokens} tokens in {1000 * (self.first - self.start):.0f} ms"
        return f"{prompt}, {rows * self.steps} tokens at {rate:.1f} tokens/s"


if __name__ == "__main__":
    run_command(main)
