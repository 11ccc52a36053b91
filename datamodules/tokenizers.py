"""Tokenizers between UTF-8 bytes and token ids: bytes, characters and Hugging Face BPE, each a plain description."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[Any]


class Tokenizer(Protocol):
    """What shards need of a tokenizer; `description` holds plain values that rebuild it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot_id(self) -> int:
        """The token that ends a document."""
        ...

    def encode_pieces(self, pieces: Iterator[bytes]) -> Iterator[Tokens]:
        """Tokens of one document whose UTF-8 bytes arrive in pieces, cut anywhere."""
        ...

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of text that each token stands for, (V,); a token that ends a document stands for one."""
        ...

    def encode(self, text: str) -> Tokens: ...

    def decode(self, ids: npt.ArrayLike) -> str: ...

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The UTF-8 bytes of the tokens, with one NUL byte where a document ends."""
        ...

    def describe(self) -> dict[str, Any]: ...


def token_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds every id."""
    return next(name for name in ("uint8", "uint16", "uint32") if vocab_size - 1 <= np.iinfo(name).max)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; NUL, which no text holds, ends a document, so 256 ids are enough."""

    vocab_size = 256
    eot_id = 0

    def encode_pieces(self, pieces: Iterator[bytes]) -> Iterator[Tokens]:
        for piece in pieces:
            yield np.frombuffer(piece, dtype=np.uint8)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        return np.ones(self.vocab_size, dtype=np.int64)

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, ids: npt.ArrayLike) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        return np.asarray(ids).astype(np.uint8).tobytes()

    def describe(self) -> dict[str, Any]:
        return {"kind": "bytes"}


def from_description(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `describe` described, as stored in a manifest or a checkpoint."""
    if description.get("kind") == "bytes":
        return ByteTokenizer()
    raise ValueError(f"unknown tokenizer {description.get('kind')!r}: wanted bytes")
