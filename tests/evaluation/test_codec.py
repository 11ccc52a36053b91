"""Tokens become text piece by piece exactly as at once; a checkpoint's data decides what tokens mean."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalrn.evaluation.codec import LetterCodec, NumberCodec, TextCodec, TextStream, codec_of, make_codec

BYTES = TextCodec({"kind": "bytes"})


def streamed(tokens: list[int], stop_strings: list[str]) -> tuple[str, list[str]]:
    stream = TextStream(BYTES, stop_strings)
    pieces = []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return "".join(pieces), pieces


@given(st.one_of(st.binary(), st.text().map(str.encode)))
def test_pieces_of_text_are_the_text(content: bytes) -> None:
    content = content.replace(b"\0", b"")
    text, pieces = streamed(list(content), [])
    assert text == content.decode("utf-8", "replace")
    "".join(pieces).encode()


def test_characters_come_whole_and_at_once() -> None:
    _, pieces = streamed(list("aé🙂b".encode()), [])
    assert pieces == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_a_character_that_is_cut_off_becomes_one_mark() -> None:
    assert streamed(list("a🙂".encode()[:-1]), [])[0] == "a\ufffd"


@given(st.text("abc"), st.lists(st.text("abc", min_size=1, max_size=3), max_size=2))
def test_text_ends_before_the_first_stop_string(content: str, stop_strings: list[str]) -> None:
    # The stream ends with the token at which a stop string is complete; of several there, the first one counts.
    ends = [content.index(text) + len(text) for text in stop_strings if text in content]
    seen = content[: min(ends)] if ends else content
    expected = min((seen.index(text) for text in stop_strings if text in seen), default=len(seen))
    assert streamed(list(content.encode()), stop_strings)[0] == seen[:expected]


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    _, pieces = streamed(list(b"a END"), ["END."])
    assert pieces == ["a", " ", "", "", "", "END"]


def test_finishing_twice_adds_nothing() -> None:
    stream = TextStream(BYTES, ["xyz"])
    assert stream.add(ord("x")) == ""
    assert stream.finish() == "x"
    assert stream.finish() == ""


def test_letters_of_the_copy_task() -> None:
    codec = LetterCodec(3)
    assert codec.encode("cab") == [0, 5, 3, 4, 1]
    assert codec.decode([5, 3, 4, 2]) == "cab"
    assert codec.decode([0, 3, 1]) == "<BOS>a<SEP>"
    with pytest.raises(ValueError, match="'d'.*letters abc"):
        codec.encode("add")
    with pytest.raises(ValueError, match="empty"):
        codec.encode("")


def test_numbers() -> None:
    codec = NumberCodec(100)
    assert codec.encode("4  17\n") == [4, 17]
    assert codec.decode([4, 17]) == "4 17 "
    with pytest.raises(ValueError, match="token ids.*'4 x'"):
        codec.encode("4 x")


def checkpoint_of(tokenizer: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "network": {"init_args": {"vocab_size": vocab_size}}}


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "kind"),
    [
        ({"kind": "bytes"}, 256, TextCodec),
        ({"kind": "chars", "characters": "abcdef"}, 8, TextCodec),
        ({"kind": "letters", "alphabet_size": 3}, 6, LetterCodec),
        ({"kind": "numbers", "vocab_size": 50}, 50, NumberCodec),
    ],
)
def test_the_tokenizer_of_a_checkpoint_chooses(
    tokenizer: dict[str, Any], vocab_size: int, kind: type
) -> None:
    assert isinstance(codec_of(checkpoint_of(tokenizer, vocab_size)), kind)


def test_another_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match="tokenizer has 256 tokens and its network 100"):
        codec_of(checkpoint_of({"kind": "bytes"}, 100))
    with pytest.raises(ValueError, match="unknown tokenizer 'morse'"):
        make_codec({"kind": "morse"})
