"""Tokenizers between UTF-8 bytes and token ids: bytes, characters and Hugging Face BPE, each a plain description."""

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from datamodules.errors import optional_module

Tokens = npt.NDArray[Any]

# Characters that BPE is given at a time: bounds the memory that a long document takes.
_BPE_CHARACTERS = 1 << 18
_WORD_SPACE = re.compile(r"(?<=\S)\s(?=\S)")


class Tokenizer(Protocol):
    """What shards need of a tokenizer; `description` holds plain values that rebuild it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot_id(self) -> int:
        """The token that ends a document."""
        ...

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
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

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
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


class CharTokenizer:
    """Unicode characters of a corpus; id 0 ends a document, id 1 stands for characters that the corpus lacks."""

    eot_id = 0
    unknown_id = 1

    def __init__(self, characters: str) -> None:
        self.characters = characters
        codes = np.array([ord(character) for character in characters], dtype=np.int64)
        self._codes = np.concatenate([[0, ord("\N{REPLACEMENT CHARACTER}")], codes]).astype("<u4")
        self._ids = np.full(0x110000, self.unknown_id, dtype=np.uint32)
        self._ids[codes] = np.arange(len(codes)) + 2

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """A tokenizer of exactly the characters in `texts`."""
        found: set[str] = set()
        for text in texts:
            found.update(text)
        return cls("".join(sorted(found)))

    @property
    def vocab_size(self) -> int:
        return len(self._codes)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        sizes = [len(character.encode()) for character in self.characters]
        return np.array([1, 1, *sizes], dtype=np.int64)

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
        return map(self.encode, decode_pieces(pieces))

    def encode(self, text: str) -> Tokens:
        return self._ids[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]

    def decode(self, ids: npt.ArrayLike) -> str:
        return self._codes[np.asarray(ids).astype(np.int64)].tobytes().decode("utf-32-le")

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        return self.decode(ids).encode()

    def describe(self) -> dict[str, Any]:
        return {"kind": "chars", "characters": self.characters}


class BpeTokenizer:
    """A tokenizer.json of the Hugging Face `tokenizers` library, kept as its text.

    Raises:
        ValueError: the text is none of a tokenizer, or the vocabulary has no token that ends a document.
    """

    # In the order of preference; ours is the first.
    END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

    def __init__(self, json_text: str) -> None:
        self._json_text = json_text
        library = optional_module("tokenizers", "a BPE tokenizer")
        try:
            self._tokenizer = library.Tokenizer.from_str(json_text)
        except Exception as error:
            # The library raises nothing more specific.
            raise ValueError(f"no tokenizer of the library `tokenizers`: {error}") from error
        # A document that spells the end token must not end there.
        self._tokenizer.encode_special_tokens = True
        ids = [self._tokenizer.token_to_id(token) for token in self.END_TOKENS]
        eot_id = next((token_id for token_id in ids if token_id is not None), None)
        if eot_id is None:
            raise ValueError(f"the tokenizer has no token that ends a document: wanted {self.END_TOKENS}")
        self.eot_id: int = eot_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Byte-level BPE of `vocab_size` tokens, the 256 bytes and the end token among them."""
        library = optional_module("tokenizers", "training a BPE tokenizer")
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[cls.END_TOKENS[0]],
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def token_bytes(self) -> npt.NDArray[np.int64]:
        # Byte-level vocabularies spell each byte as one character; others spell text, a space as U+2581.
        byte_level = '"ByteLevel"' in self._json_text
        sizes = np.ones(self.vocab_size, dtype=np.int64)
        for token, token_id in self._tokenizer.get_vocab().items():
            if token_id != self.eot_id:
                sizes[token_id] = len(token if byte_level else token.replace("\u2581", " ").encode())
        return sizes

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
        kept = ""
        for text in decode_pieces(pieces):
            kept += text
            if len(kept) >= _BPE_CHARACTERS:
                # Cut before a lone space between words, where byte-level BPE never merges across.
                cuts = [match.start() for match in _WORD_SPACE.finditer(kept, len(kept) // 2)]
                cut = cuts[-1] if cuts else len(kept)
                yield self.encode(kept[:cut])
                kept = kept[cut:]
        if kept:
            yield self.encode(kept)

    def encode(self, text: str) -> Tokens:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: npt.ArrayLike) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        documents = np.split(np.asarray(ids), np.flatnonzero(np.asarray(ids) == self.eot_id))
        # Each part but the first begins with the end token, which decoding leaves out.
        return b"\0".join(self.decode(part).encode() for part in documents)

    def describe(self) -> dict[str, Any]:
        return {"kind": "bpe", "tokenizer_json": self._json_text}


def decode_pieces(pieces: Iterable[bytes]) -> Iterator[str]:
    """Text of UTF-8 bytes that were cut anywhere; a character cut off at either end becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        yield decoder.decode(piece)
    if rest := decoder.decode(b"", final=True):
        yield rest


def from_description(description: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `describe` described, as stored in a manifest or a checkpoint."""
    kind = description.get("kind")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer(description["characters"])
    if kind == "bpe":
        return BpeTokenizer(description["tokenizer_json"])
    raise ValueError(f"unknown tokenizer {kind!r}: wanted bytes, chars or bpe")
