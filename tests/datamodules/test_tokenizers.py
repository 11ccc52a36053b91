"""Tokenizers: what they encode they decode, in pieces as at once, and their description rebuilds them."""

import json
from pathlib import Path

import numpy as np
import pytest

from datamodules import tokenizers
from datamodules.prepare.__main__ import main
from datamodules.shards import Manifest, TokenReader
from datamodules.text import TextDataModule
from datamodules.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    from_description,
    token_dtype,
)

TEXT = "The quick brown fox. Straße, 東京 😀!\n\nA second  paragraph, with  spaces.\n" * 20


def make(kind: str) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer.train([TEXT[:500], TEXT[500:]])
    return BpeTokenizer.train([TEXT], vocab_size=300)


@pytest.fixture(params=["bytes", "chars", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make(request.param)


def test_text_survives(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert int(ids.max()) < tokenizer.vocab_size
    assert tokenizer.eot_id not in ids


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_pieces_may_be_cut_anywhere(tokenizer: Tokenizer, size: int) -> None:
    content = TEXT.encode()
    pieces = (content[start : start + size] for start in range(0, len(content), size))
    assert np.concatenate(list(tokenizer.encode_pieces(pieces))).tolist() == tokenizer.encode(TEXT).tolist()


def test_long_documents_are_cut_where_no_merge_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_BPE_CHARACTERS", 64)
    tokenizer = make("bpe")
    parts = list(tokenizer.encode_pieces([TEXT[:700].encode(), TEXT[700:].encode()]))
    assert len(parts) > 2
    assert np.concatenate(parts).tolist() == tokenizer.encode(TEXT).tolist()


def test_the_description_is_plain_and_rebuilds(tokenizer: Tokenizer) -> None:
    rebuilt = from_description(json.loads(json.dumps(tokenizer.describe())))
    assert rebuilt.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert (rebuilt.vocab_size, rebuilt.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)


def test_bytes_of_tokens_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    ids = np.concatenate([tokenizer.encode(TEXT), [tokenizer.eot_id], tokenizer.encode("next")])
    content = TEXT.encode() + b"\0next"
    assert tokenizer.decode_bytes(ids) == content
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes()[ids].sum() == len(content)


def test_characters_that_the_corpus_lacks() -> None:
    tokenizer = CharTokenizer.train(["abc"])
    assert tokenizer.encode("axc").tolist() == [2, 1, 4]
    assert tokenizer.decode([2, 1, 4]) == "a\N{REPLACEMENT CHARACTER}c"


def test_a_document_that_spells_the_end_token_does_not_end_there() -> None:
    tokenizer = make("bpe")
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_a_vocabulary_without_an_end_is_refused() -> None:
    without = json.loads(BpeTokenizer.train([TEXT], 300).describe()["tokenizer_json"])
    without["added_tokens"] = []
    del without["model"]["vocab"]["<|endoftext|>"]
    with pytest.raises(ValueError, match="has no token that ends a document: wanted"):
        BpeTokenizer(json.dumps(without))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="unknown tokenizer 'words': wanted bytes, chars or bpe"):
        from_description({"kind": "words"})


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_type_holds_every_id(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype


@pytest.mark.parametrize("kind", ["chars", "bpe", "file"])
def test_shards_of_every_tokenizer_give_the_text_back(tmp_path: Path, kind: str) -> None:
    documents = [f"{number} {TEXT}" for number in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    name = kind
    if kind == "file":
        name = str(tmp_path / "tokenizer.json")
        Path(name).write_text(make("bpe").describe()["tokenizer_json"])
    arguments = ["text", "--input", str(tmp_path / "corpus.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--tokenizer", name, "--vocab-size", "400", "--seed", "1"]) == 0
    manifest = Manifest.load(tmp_path / "out")
    tokenizer = from_description(manifest.tokenizer)
    found = []
    for split, listed in manifest.splits.items():
        reader = TokenReader(tmp_path / "out", manifest, split)
        ids = np.empty(listed.tokens, dtype=reader.dtype)
        reader.read_into(ids, 0)
        found += tokenizer.decode_bytes(ids).decode().split("\0")[:-1]
    assert sorted(found) == sorted(documents)
    data = TextDataModule(str(tmp_path / "out"), 16, vocab_size=manifest.vocab_size)
    assert data.state_dict()["tokenizer"] == manifest.tokenizer
    assert set(data.baselines()) == {"unigram_entropy", "5-gram", "xz"}


def test_a_tokenizer_that_is_no_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    arguments = ["text", "--input", str(tmp_path), "--output", str(tmp_path / "out"), "--tokenizer", "words"]
    assert main(arguments) == 1
    assert "no tokenizer words: wanted bytes, chars, bpe or a tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "no tokenizer of the library"),
        (b'{"version": "1.0"}', "no tokenizer of the library"),
        (b"\xff\xfe", "can't decode"),
        (
            b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
            "no token that ends a document",
        ),
    ],
    ids=["empty", "cut", "binary", "endless"],
)
def test_a_broken_tokenizer_is_named(
    content: bytes, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    broken = tmp_path / "tokenizer.json"
    broken.write_bytes(content)
    flags = ["--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / "shards")]
    assert main(["text", *flags, "--tokenizer", str(broken)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prepare: error: --tokenizer {broken}: ")
    assert wanted in line
    assert not (tmp_path / "shards").exists()


def test_a_manifest_with_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    shards = tmp_path / "shards"
    flags = ["--input", str(tmp_path / "text.txt"), "--output", str(shards), "--split-by", "position"]
    assert main(["text", *flags, "--tokenizer", "bpe", "--vocab-size", "300"]) == 0
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["tokenizer"]["tokenizer_json"] = manifest["tokenizer"]["tokenizer_json"][:100]
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json: no tokenizer of the library `tokenizers`"):
        _ = TextDataModule(str(shards), vocab_size=manifest["vocab_size"]).tokenizer
