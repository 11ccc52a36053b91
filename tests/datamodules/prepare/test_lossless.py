"""Every tokenizer gives the whole text back or is refused, and its tokens count the bytes of the text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from datamodules import tokenizers
from datamodules.baselines import baselines
from datamodules.prepare.__main__ import main
from datamodules.shards import Manifest
from datamodules.text import TextDataModule
from datamodules.tokenizers import BpeTokenizer, from_description
from tests.datamodules.corpora import read_tokens

TEXT = "The quick brown Fox. Straße, 東京 😀 ﬁne!\n\n A second  paragraph,\twith  spaces.\n"
DOCUMENTS = [f"{number} {TEXT * 20}" for number in range(40)]


def byte_level(vocab_size: int = 300) -> Tokenizer:
    return Tokenizer.from_str(BpeTokenizer.train([TEXT * 20], vocab_size).describe()["tokenizer_json"])


def sentencepiece(scheme: str = "prepend") -> Tokenizer:
    """As SentencePiece models are converted: a space before each text, bytes for what no token spells."""
    space = "\u2581"
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for token in (space, *"Tequickbrownfxadsptg", space + "q", "th", space + space, "東"):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [(space, "q"), ("t", "h"), (space, space)]
    vocabulary["h"] = len(vocabulary)
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(space), normalizers.Replace(" ", space)]
        )
        last: list[Any] = [decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        last = [decoders.Strip(" ", 1, 0)] if scheme == "always" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def with_added_tokens() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("東京", normalized=False), AddedToken("  ", normalized=False)])
    return tokenizer


def with_a_gap() -> Tokenizer:
    values = json.loads(byte_level().to_str())
    vocabulary = values["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] += 7
    return Tokenizer.from_str(json.dumps(values))


def prepared(
    folder: Path, tokenizer: Tokenizer | str, documents: list[str] = DOCUMENTS, *more: str
) -> tuple[int, Path]:
    """The exit code of preparing the documents, and the tokenizer's file."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    path = folder / "tokenizer.json"
    path.write_text(tokenizer if isinstance(tokenizer, str) else tokenizer.to_str())
    given = ["text", "--input", str(folder / "corpus.jsonl"), "--output", str(folder / "out")]
    return main([*given, "--tokenizer", str(path), "--seed", "1", "--workers", "1", *more]), path


def truncated() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_truncation(16)
    return tokenizer


def padded() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.enable_padding(
        length=2000, pad_token="<|endoftext|>", pad_id=tokenizer.token_to_id("<|endoftext|>")
    )
    return tokenizer


def surrounded() -> Tokenizer:
    tokenizer = byte_level()
    end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[end]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("make", "said"), [(truncated, "truncation"), (padded, "padding"), (surrounded, None)]
)
def test_what_a_file_does_to_texts_is_not_done(
    tmp_path: Path, make: Callable[[], Tokenizer], said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain").mkdir()
    assert prepared(tmp_path / "plain", byte_level())[0] == 0
    assert "switched off" not in capsys.readouterr().err
    code, path = prepared(tmp_path, make())
    assert code == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "switched off" in line]
    assert lines == ([f"{path}: {said} switched off, so that documents are encoded whole"] if said else [])
    for split in ("train", "val", "test"):
        assert np.array_equal(
            read_tokens(tmp_path / "out", split), read_tokens(tmp_path / "plain" / "out", split)
        )
    # Prompts too, long after.
    tokenizer = from_description(Manifest.load(tmp_path / "out").tokenizer)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    "make", [byte_level, sentencepiece, lambda: sentencepiece("always"), with_added_tokens, with_a_gap]
)
def test_tokens_count_the_bytes_of_the_text(
    tmp_path: Path, make: Callable[[], Tokenizer], monkeypatch: Any
) -> None:
    # Documents of 1700 characters in several parts.
    monkeypatch.setattr(tokenizers, "_BPE_CHARACTERS", 600)
    assert prepared(tmp_path, make())[0] == 0
    manifest = Manifest.load(tmp_path / "out")
    tokenizer = from_description(manifest.tokenizer)
    texts = []
    for name, split in manifest.splits.items():
        tokens = read_tokens(tmp_path / "out", name)
        assert int(tokenizer.token_bytes()[tokens].sum()) == split.text_bytes + split.documents
        texts += tokenizer.decode_bytes(tokens).decode().split("\0")[:-1]
    assert sorted(texts) == sorted(DOCUMENTS)
    assert sum(split.text_bytes for split in manifest.splits.values()) == sum(
        len(t.encode()) for t in DOCUMENTS
    )
    data = TextDataModule(str(tmp_path / "out"), 16, vocab_size=manifest.vocab_size)
    assert data.token_bytes.shape == (manifest.vocab_size,)
    assert int(read_tokens(tmp_path / "out", "train").max()) < manifest.vocab_size


def lower_case() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def compatible() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def without_spaces() -> Tokenizer:
    tokenizer = byte_level()
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), byte])
    return tokenizer


def with_a_space_before() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def without_decoder() -> str:
    return json.dumps({**json.loads(byte_level().to_str()), "decoder": None})


def taking_spaces() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("Fox", lstrip=True)])
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "The": 2, "quick": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "was", "became"),
    [
        (lower_case, "0 The quick brown Fox. S", "0 the quick brown fox. s"),
        (compatible, "京 😀 ﬁne!", "京 😀 fine!"),
        (without_spaces, "0 The quick", "0Thequick"),
        (with_a_space_before, "0 The", " 0 The"),
        (without_decoder, "0 The", "0 Ġ"),
        (taking_spaces, " brown Fox. ", " brownFox. "),
        (words, "0 The", "The quick"),
        (lambda: sentencepiece("never"), None, None),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(
    tmp_path: Path,
    make: Callable[[], Any],
    was: str | None,
    became: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, path = prepared(tmp_path, make())
    if was is None or became is None:
        # Nothing lost by the one among its like that is told to change nothing.
        assert code == 0
        return
    assert code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"prepare: error: {path}: {tmp_path}/corpus.jsonl, line at byte 0: the tokenizer does not"
    )
    _, _, difference = error.partition("give the text back: ")
    assert was in difference.partition(" became ")[0]
    assert became in difference.partition(" became ")[2]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_text_that_spells_the_end_is_refused_where_it_would_end_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = json.loads(byte_level().to_str())
    values["added_tokens"][0]["special"] = False
    assert prepared(tmp_path, json.dumps(values), [*DOCUMENTS, "one <|endoftext|> two"])[0] == 1
    assert (
        "holds '<|endoftext|>', which the tokenizer takes for the end"
        in capsys.readouterr().err.splitlines()[-1]
    )


def test_a_tokenizer_that_cannot_spell_a_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepared(tmp_path, Tokenizer(models.WordLevel({"</s>": 0, "The": 1})))[0] == 1
    assert "tokenizer.json: " in (error := capsys.readouterr().err.splitlines()[-1])
    assert "the tokenizer cannot encode" in error


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_baselines_are_of_the_bytes_of_the_text(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    """However many tokens are compared, also where the last of them ends inside a character."""
    assert prepared(tmp_path, make())[0] == 0
    tokens = read_tokens(tmp_path / "out", "val")
    manifest = Manifest.load(tmp_path / "out")
    whole = from_description(manifest.tokenizer).decode_bytes(tokens)
    seen = set()
    for size in range(40, 80):
        part = from_description(manifest.tokenizer).decode_bytes(tokens[:size])
        assert whole.startswith(part)
        seen.add(len(part))
    assert len(seen) > 10
    assert baselines(tmp_path / "out", 60)["xz"] > 0


@pytest.mark.parametrize("size", ["0", "256"])
def test_too_small_a_vocabulary_is_refused(
    tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT * 50)
    given = ["text", "--input", str(tmp_path / "corpus.txt"), "--output", str(tmp_path / "out")]
    assert main([*given, "--tokenizer", "bpe", "--vocab-size", size]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prepare: error: vocab_size of a BPE must be at least 257, ")
    assert error.endswith(f"got {size}")


def test_fewer_tokens_than_asked_for_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.txt").write_text("abc " * 500)
    given = ["text", "--input", str(tmp_path / "corpus.txt"), "--output", str(tmp_path / "out")]
    assert main([*given, "--tokenizer", "bpe", "--vocab-size", "8192"]) == 0
    found = Manifest.load(tmp_path / "out").vocab_size
    assert found < 300
    assert (
        f"pairs to merge for {found} tokens only; a model needs vocab_size: {found}"
        in capsys.readouterr().err
    )
    assert main([*given, "--vocab-size", "300", "--overwrite"]) == 0
    assert "--vocab-size 300 has no effect: --tokenizer bytes is not bpe" in capsys.readouterr().err
