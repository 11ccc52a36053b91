"""Counts the bytes of text that each token of a Hugging Face tokenizer stands for."""

import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

# The decoder ByteFallback puts bytes together that no token spells; each is a token written like this.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_sizes(tokenizer: Any, vocab_size: int) -> npt.NDArray[np.int64]:
    """Bytes of each token of a `tokenizers.Tokenizer` where it is not the first of a text, (V,); 0 for a gap."""
    decoders = _kinds(json.loads(tokenizer.to_str()).get("decoder"))
    added = tokenizer.get_added_tokens_decoder()
    sizes = np.zeros(vocab_size, dtype=np.int64)
    for token_id, token in added.items():
        sizes[token_id] = len(token.content.encode())
    others = {token: number for token, number in tokenizer.get_vocab().items() if number not in added}
    if "ByteLevel" in decoders:
        # These spell each byte as one character.
        for token, token_id in others.items():
            sizes[token_id] = len(token)
        return sizes
    # A decoder may change what opens a text, as by taking a space away: the second of two tokens is what counts.
    ids = list(others.values())
    once = tokenizer.decode_batch([[token_id] for token_id in ids])
    twice = tokenizer.decode_batch([[token_id, token_id] for token_id in ids])
    for token_id, one, two in zip(ids, once, twice, strict=True):
        sizes[token_id] = len(two.encode()) - len(one.encode())
    if "ByteFallback" in decoders:
        for token, token_id in others.items():
            if _BYTE.fullmatch(token):
                sizes[token_id] = 1
    return sizes


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_kinds, decoder.get("decoders", [])))
