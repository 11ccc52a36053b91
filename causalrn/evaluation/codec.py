"""Turns prompts into tokens and tokens into text, by a checkpoint's tokenizer, as letters, or as numbers."""

import string
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from datamodules.tasks.strings import BOS, EOS, FIRST_LETTER, SEP
from datamodules.tokenizers import from_description

# A character whose bytes have not all come yet is decoded as this.
CUT_OFF = "\N{REPLACEMENT CHARACTER}"


class Codec(Protocol):
    """Encodes prompts and decodes tokens."""

    vocab_size: int
    stop_tokens: tuple[int, ...]
    # The temperature where the user gives none. A task with one right answer wants the most likely token.
    default_temperature: float

    def encode(self, prompt: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class TextCodec:
    """Text through the tokenizer of the shards; the token that ends a document ends the generation."""

    default_temperature = 0.8

    def __init__(self, description: dict[str, Any]) -> None:
        self.tokenizer = from_description(description)
        self.vocab_size = self.tokenizer.vocab_size
        self.stop_tokens: tuple[int, ...] = (self.tokenizer.eot_id,)

    def encode(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt).tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(np.asarray([token for token in tokens if token not in self.stop_tokens]))


class LetterCodec:
    """The copy task: the prompt `s` becomes `BOS s SEP`, so that the model answers with `s EOS`.

    Args:
        alphabet_size: letters from a on, at most 26.
    """

    default_temperature = 0.0
    stop_tokens: tuple[int, ...] = (EOS,)

    def __init__(self, alphabet_size: int) -> None:
        self.letters = string.ascii_lowercase[:alphabet_size]
        self.vocab_size = FIRST_LETTER + alphabet_size

    def encode(self, prompt: str) -> list[int]:
        """Raises a ValueError for anything but letters of the alphabet."""
        if wrong := sorted({letter for letter in prompt if letter not in self.letters}):
            raise ValueError(f"prompt holds {wrong[0]!r}; this model copies the letters {self.letters}")
        if not prompt:
            raise ValueError("prompt is empty; want the letters to copy")
        return [BOS, *(FIRST_LETTER + self.letters.index(letter) for letter in prompt), SEP]

    def decode(self, tokens: Sequence[int]) -> str:
        names = {BOS: "<BOS>", SEP: "<SEP>", EOS: ""}
        return "".join(
            self.letters[token - FIRST_LETTER] if token >= FIRST_LETTER else names[token] for token in tokens
        )


class NumberCodec:
    """Token ids as numbers between spaces, for models without a tokenizer."""

    default_temperature = 0.0
    stop_tokens: tuple[int, ...] = ()

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, prompt: str) -> list[int]:
        """Raises a ValueError for anything but whole numbers."""
        try:
            return [int(word) for word in prompt.split()]
        except ValueError:
            raise ValueError(
                f"prompt must be token ids, as in '0 7 12 1': got {prompt[:40]!r}; the checkpoint has no tokenizer"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(f"{token} " for token in tokens)


def codec_of(checkpoint: dict[str, Any]) -> Codec:
    """The codec of a checkpoint's field `tokenizer`.

    Raises:
        ValueError: the checkpoint's tokenizer has another vocabulary than its network.
    """
    codec, vocab_size = make_codec(checkpoint["tokenizer"]), checkpoint["network"]["init_args"]["vocab_size"]
    if codec.vocab_size != vocab_size:
        raise ValueError(
            f"the checkpoint's tokenizer has {codec.vocab_size} tokens and its network {vocab_size}: want a "
            "checkpoint whose data and model belong together"
        )
    return codec


def make_codec(description: dict[str, Any]) -> Codec:
    """The codec of a description: of a tokenizer, or of the kind "letters" or "numbers"."""
    if description["kind"] == "letters":
        return LetterCodec(description["alphabet_size"])
    if description["kind"] == "numbers":
        return NumberCodec(description["vocab_size"])
    return TextCodec(description)


class TextStream:
    """Text of tokens that come one by one, cut at the first stop string; every piece is whole characters.

    Args:
        codec: what the tokens look like.
        stop_strings: text that ends the stream and is not part of it.
        before: tokens that the stream goes on from, as those of a prompt.
    """

    def __init__(self, codec: Codec, stop_strings: Iterable[str] = (), before: Sequence[int] = ()) -> None:
        self.codec = codec
        self.stop_strings = [text for text in stop_strings if text]
        self.stopped = False
        self.held = ""
        self.follow(before)

    def follow(self, tokens: Sequence[int]) -> None:
        """Goes on from tokens that are shown: a token may look otherwise where it opens a text, without its space."""
        self.tokens = list(tokens[-1:])
        self.decoded = self.codec.decode(self.tokens)

    def add(self, token: int) -> str:
        """The text that is certain now: no character that is cut off, nothing that may begin a stop string."""
        self.tokens.append(token)
        text = self.codec.decode(self.tokens)
        whole = text.removesuffix(CUT_OFF)
        new, self.decoded = whole[len(self.decoded) :], whole
        if whole == text:
            # No later token changes what these look like.
            self.follow(self.tokens)
        self.held += new
        return self.release(final=False)

    def finish(self) -> str:
        """The rest at the end: a character that is cut off becomes U+FFFD."""
        if not self.stopped and self.tokens:
            self.held += self.codec.decode(self.tokens)[len(self.decoded) :]
        self.tokens, self.decoded = [], ""
        return self.release(final=True)

    def release(self, final: bool) -> str:
        if self.stopped:
            return ""
        found = [index for text in self.stop_strings if (index := self.held.find(text)) >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        keep = 0 if final else self.possible_stop()
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return out

    def possible_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(text) for text in self.stop_strings), default=1)
        return next(
            (
                size
                for size in range(min(longest - 1, len(self.held)), 0, -1)
                if any(text.startswith(self.held[-size:]) for text in self.stop_strings)
            ),
            0,
        )
