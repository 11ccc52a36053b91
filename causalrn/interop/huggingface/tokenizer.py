"""The tokenizers of causalrn as Hugging Face tokenizers, which AutoTokenizer reads without other code."""

import string
from typing import Any

from causalrn.system import optional_module
from datamodules.tasks.strings import BOS, EOS, FIRST_LETTER, SEP
from datamodules.tokenizers import BpeTokenizer


def make_tokenizer(description: dict[str, Any]) -> Any:
    """A `PreTrainedTokenizerFast` with the same ids, or None for plain token numbers.

    Texts that spell a special token are encoded as text. A prompt of letters gets the copy task's `BOS s SEP`.

    Args:
        description: see `causalrn.evaluation.codec.describe_codec`.
    """
    transformers = optional_module("transformers", "huggingface", "a tokenizer in the Hugging Face format")
    tokenizers = optional_module("tokenizers", "huggingface", "a tokenizer in the Hugging Face format")
    kind = description["kind"]
    special: dict[str, str] = {}
    if kind == "numbers":
        return None
    if kind == "letters":
        tokenizer, special = letters(tokenizers, description["alphabet_size"])
    elif kind == "bytes":
        tokenizer, end = utf8_bytes(tokenizers)
        special = {"eos_token": end, "pad_token": end}
    elif kind == "chars":
        tokenizer, special = characters(tokenizers, description["characters"])
    else:
        bpe = BpeTokenizer(description["tokenizer_json"])
        tokenizer = tokenizers.Tokenizer.from_str(bpe.tokenizer_json)
        end = tokenizer.id_to_token(bpe.eot_id)
        special = {"eos_token": end, "pad_token": end}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        # Generation needs the last token of every row at the end.
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **special,
    )


def letters(tokenizers: Any, alphabet_size: int) -> tuple[Any, dict[str, str]]:
    """The copy task's letters, between `<bos>` and `<sep>`."""
    names = {BOS: "<bos>", SEP: "<sep>", EOS: "<eos>"}
    vocabulary = {name: token for token, name in names.items()}
    for index, letter in enumerate(string.ascii_lowercase[:alphabet_size]):
        vocabulary[letter] = FIRST_LETTER + index
    tokenizer = split_into_characters(tokenizers, vocabulary)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <sep>", special_tokens=[("<bos>", BOS), ("<sep>", SEP)]
    )
    return tokenizer, {
        "bos_token": "<bos>",
        "sep_token": "<sep>",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
    }


def characters(tokenizers: Any, known: str) -> tuple[Any, dict[str, str]]:
    """A corpus' characters; id 0 ends a document, id 1 stands for characters that the corpus lacks."""
    end, unknown = "<|endoftext|>", "\N{REPLACEMENT CHARACTER}"
    vocabulary = {end: 0, unknown: 1, **{character: 2 + i for i, character in enumerate(known)}}
    tokenizer = split_into_characters(tokenizers, vocabulary, unknown)
    return tokenizer, {"eos_token": end, "pad_token": end}


def split_into_characters(tokenizers: Any, vocabulary: dict[str, int], unknown: str | None = None) -> Any:
    # Without an unknown token a character outside the vocabulary is an error.
    options = {} if unknown is None else {"unk_token": unknown}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, **options))
    # Any character, a line break included, is a piece of its own.
    pattern = tokenizers.Regex(r"[\s\S]")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return tokenizer


def utf8_bytes(tokenizers: Any) -> tuple[Any, str]:
    """UTF-8 bytes as ids 0 to 255, and how NUL, which ends a document, is spelled: byte-level BPE without merges."""
    spelling = byte_spelling()
    vocabulary = {spelled: byte for byte, spelled in enumerate(spelling)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer, spelling[0]


def byte_spelling() -> list[str]:
    """The character by which byte-level BPE spells each byte: itself where it is visible, else one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
