"""Tokens that mean something else at the beginning of a text: what is shown and exported is what the model has."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from causalrn import generate
from causalrn.evaluation.codec import TextCodec, TextStream
from causalrn.models import LanguageModel, QuadraticRelation
from causalrn.models.decoding import GREEDY
from causalrn.models.decoding import generate as generate_tokens
from causalrn.training.checkpoint import save_network
from datamodules.tokenizers import BpeTokenizer

TEXT = "the cat sat on the mat"


def words() -> str:
    """A tokenizer.json whose tokens hold the space before a word, which its decoder leaves out at the beginning."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    return tokenizer.to_str()


@pytest.fixture
def codec() -> TextCodec:
    return TextCodec({"kind": "bpe", "tokenizer_json": words()})


def test_spaces_between_tokens_that_come_one_by_one(codec: TextCodec) -> None:
    tokens = codec.encode(TEXT)
    assert len(tokens) == 6
    stream = TextStream(codec)
    assert "".join([stream.add(token) for token in tokens]) + stream.finish() == TEXT
    for count in range(1, 6):
        stream = TextStream(codec, before=tokens[:count])
        pieces = [stream.add(token) for token in tokens[count:]]
        assert codec.decode(tokens[:count]) + "".join(pieces) + stream.finish() == TEXT


def test_bytes_before_a_stream_are_not_shown_again() -> None:
    codec = TextCodec({"kind": "bytes"})
    for before in ("é", "a", ""):
        stream = TextStream(codec, before=codec.encode(before))
        assert [stream.add(token) for token in codec.encode("éb")] == ["", "é", "b"]
        assert stream.finish() == ""
    stream = TextStream(codec, before=codec.encode("é"))
    assert stream.add(0xC3) + stream.finish() == "\ufffd"


@pytest.mark.slow
def test_the_command_keeps_spaces(
    tmp_path: Path, codec: TextCodec, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = LanguageModel(QuadraticRelation(8, 12), codec.vocab_size, n_layers=1, max_length=24)
    torch.nn.init.normal_(network.head.weight)
    # Words only, and no end: a mean is never the largest.
    words = [token for token in range(codec.vocab_size) if codec.decode([0, token, token]).count(" ") == 1]
    assert len(words) > 4
    with torch.no_grad():
        others = [token for token in range(codec.vocab_size) if token not in words]
        network.head.weight[others] = network.head.weight[words].mean(0)
    save_network(network.eval(), tmp_path / "model.ckpt", {"tokenizer": codec.tokenizer.describe()})
    prompt = codec.encode("the cat")
    tokens = generate_tokens(network, torch.tensor([prompt]), 8, GREEDY)[0].tolist()
    expected = codec.decode([*prompt, *tokens]).removeprefix("the cat")
    assert expected.startswith(" ")
    generate.main(
        ["--checkpoint", str(tmp_path / "model.ckpt"), "--prompt", "the cat", "--greedy", "--max-tokens", "8"]
    )
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.slow
def test_an_exported_tokenizer_encodes_as_the_model_was_trained() -> None:
    pytest.importorskip("transformers", reason="the extra huggingface is not installed")
    from causalrn.interop.huggingface.tokenizer import make_tokenizer

    tokenizer = Tokenizer.from_str(BpeTokenizer.train([TEXT * 20], 270).describe()["tokenizer_json"])
    end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[end])
    description = {"kind": "bpe", "tokenizer_json": tokenizer.to_str()}
    exported = make_tokenizer(description)
    assert json.loads(description["tokenizer_json"])["truncation"] is not None
    for text in (TEXT, "a <|endoftext|> b", ""):
        assert exported(text).input_ids == TextCodec(description).encode(text)
