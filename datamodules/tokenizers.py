"""Tokenizers between UTF-8 bytes and token ids: bytes, characters and Hugging Face BPE, each a plain description."""

import codecs
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from datamodules.errors import SHOWN_CHARACTERS, TokenizerError, difference, optional_module
from datamodules.token_sizes import token_sizes

Tokens = npt.NDArray[Any]

# BPE is given so many characters at a time, which bounds the memory that a long document takes.
_BPE_CHARACTERS = 1 << 18
_WORD_SPACE = re.compile(r"(?<=\S)\s(?=\S)")
_LONE_SPACE = re.compile(r"(?<=\S) (?=\S)")
# The 256 bytes, and the token that ends a document.
LEAST_BPE_TOKENS = 257


class Tokenizer(Protocol):
    """A tokenizer as shards need it; `describe` gives plain values that rebuild it."""

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
        """Bytes of text that each token stands for, (V,), so that those of a whole document and the token that ends it
        add up to the bytes of its text and one."""
        ...

    def encode(self, text: str) -> Tokens: ...

    def decode(self, ids: npt.ArrayLike) -> str: ...

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The UTF-8 bytes of the tokens, with one NUL byte where a document ends. A BPE leaves out a character that the
        tokens end within."""
        ...

    def describe(self) -> dict[str, Any]: ...


def token_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds every id."""
    return next(name for name in ("uint8", "uint16", "uint32") if vocab_size - 1 <= np.iinfo(name).max)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255. NUL, which no text holds, ends a document, so 256 ids are enough."""

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

    Truncation, padding and tokens around a text, which the file may ask for, are switched off, so that exactly the text
    is encoded.

    Attributes:
        switched_off: which of "truncation" and "padding" the file asks for.

    Raises:
        ValueError: the text is none of a tokenizer, or the vocabulary has no token that ends a document.
    """

    # In the order of preference; ours is the first.
    END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

    def __init__(self, json_text: str) -> None:
        self._json_text = json_text
        library = optional_module("tokenizers", "data", "a BPE tokenizer")
        try:
            self._tokenizer = library.Tokenizer.from_str(json_text)
        except Exception as error:
            # The library raises nothing more specific.
            raise ValueError(f"no tokenizer of the library `tokenizers`: {error}") from error
        # A document that spells the end token must not end there.
        self._tokenizer.encode_special_tokens = True
        self.switched_off = [name for name in ("truncation", "padding") if getattr(self._tokenizer, name)]
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.post_processor = None
        ids = [self._tokenizer.token_to_id(token) for token in self.END_TOKENS]
        eot_id = next((token_id for token_id in ids if token_id is not None), None)
        if eot_id is None:
            raise ValueError(f"the tokenizer has no token that ends a document: wanted {self.END_TOKENS}")
        self.eot_id: int = eot_id
        # Ids that no token has count too, because a model needs a row for each id up to the highest.
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Byte-level BPE of `vocab_size` tokens, the 256 bytes and the end token among them, or as many as the texts
        have pairs to merge for.

        Raises:
            ValueError: fewer tokens are wanted than there are bytes.
        """
        if vocab_size < LEAST_BPE_TOKENS:
            raise ValueError(
                f"vocab_size of a BPE must be at least {LEAST_BPE_TOKENS}, the 256 bytes and the token that ends a "
                f"document: got {vocab_size}"
            )
        library = optional_module("tokenizers", "data", "training a BPE tokenizer")
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
    def tokenizer_json(self) -> str:
        """The tokenizer as it is used here: without truncation, padding and tokens around a text."""
        return self._tokenizer.to_str()

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether the tokens of a text stand for a space before it, which decoding takes away again."""
        ids = self.encode("a")
        return self.decode(ids) == "a" and int(self._sizes[ids].sum()) == 2

    @functools.cached_property
    def _sizes(self) -> npt.NDArray[np.int64]:
        return token_sizes(self._tokenizer, self.vocab_size)

    def token_bytes(self) -> npt.NDArray[np.int64]:
        sizes = self._sizes.copy()
        # The space before a document is counted already, so the end counts for nothing.
        sizes[self.eot_id] = 0 if self._adds_space else 1
        return sizes

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
        """Raises a TokenizerError, which shows the first difference, if the tokens do not give the text back."""
        kept, opens = "", True
        for text in decode_pieces(pieces):
            kept += text
            if len(kept) >= _BPE_CHARACTERS:
                # Cut before a lone space between words, where byte-level BPE never merges across.
                space = _LONE_SPACE if self._adds_space else _WORD_SPACE
                cuts = [match.start() for match in space.finditer(kept, len(kept) // 2)]
                if not cuts and self._adds_space:
                    continue
                cut = cuts[-1] if cuts else len(kept)
                yield self._encode_part(kept[:cut], opens)
                kept, opens = kept[cut:], False
        if kept:
            yield self._encode_part(kept, opens)

    def _encode_part(self, text: str, opens: bool) -> Tokens:
        if self._adds_space and not opens:
            # The space before a later part is the one that its tokens stand for.
            text = text[1:]
        ids = self.encode(text)
        found = self.decode(ids)
        if found != text:
            raise TokenizerError(f"the tokenizer does not give the text back: {difference(text, found)}")
        if self.eot_id in ids:
            end = self._tokenizer.id_to_token(self.eot_id)
            raise TokenizerError(f"the text holds {end!r}, which the tokenizer takes for the end of one")
        size, counted = len(text.encode()) + self._adds_space, int(self._sizes[ids].sum())
        if counted != size:
            raise TokenizerError(
                f"bytes cannot be counted by this tokenizer's tokens: {counted} for the {size} of "
                f"{text[:SHOWN_CHARACTERS]!r}..."
            )
        return ids

    def encode(self, text: str) -> Tokens:
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        # The library has no exception of its own for what a vocabulary without an unknown token cannot spell.
        except Exception as error:  # noqa: BLE001
            shown = text[:SHOWN_CHARACTERS]
            raise TokenizerError(f"the tokenizer cannot encode {shown!r}: {error}") from None
        return np.array(ids, dtype=np.uint32)

    def decode(self, ids: npt.ArrayLike) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        ids = np.asarray(ids)
        documents = np.split(ids, np.flatnonzero(ids == self.eot_id))
        # Each part but the first begins with the end token, which decoding leaves out.
        content = b"\0".join(self.decode(part).encode() for part in documents)
        last = documents[-1][documents[-1] != self.eot_id]
        if len(self.decode(last).encode()) + self._adds_space != int(self._sizes[last].sum()):
            # The tokens end within a character, whose bytes make no text.
            content = content.decode().rstrip("\N{REPLACEMENT CHARACTER}").encode()
        return content

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
