"""Exported folders: the same logits, gradients and tokens without this package, and back again bit for bit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before transformers is imported: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch.testing import assert_close

from causalrn import export
from causalrn.models import (
    MLP,
    LanguageModel,
    LinearAttention,
    LinearRelation,
    Mixer,
    NoPositions,
    QuadraticRelation,
    QuadraticRelationWithoutPostNorm,
    Rotary,
    SoftmaxAttention,
    describe,
)
from causalrn.models.decoding import generate
from causalrn.training.checkpoint import load_network, read_checkpoint, save_network
from causalrn.training.errors import run_command
from datamodules.tokenizers import BpeTokenizer, CharTokenizer

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.slow

MIXERS: dict[str, Callable[[bool], Mixer]] = {
    "quadratic": lambda causal: QuadraticRelation(8, 12, n_heads=2, causal=causal),
    "approx gelu": lambda causal: QuadraticRelation(
        8, 12, causal=causal, pre_norm="approx", activation="gelu"
    ),
    "none relu": lambda causal: QuadraticRelation(8, 12, causal=causal, pre_norm="none", activation="relu"),
    "no post-norm": lambda causal: QuadraticRelationWithoutPostNorm(8, 12, causal=causal, norm="rms"),
    "linear": lambda causal: LinearRelation(8, 12, n_heads=3, causal=causal),
    "softmax": lambda causal: SoftmaxAttention(8, n_heads=2, causal=causal),
    "linear attention": lambda causal: LinearAttention(8, n_heads=2, causal=causal),
}
BYTES = {"kind": "bytes"}


def make_network(mixer: Mixer, vocab_size: int = 256, max_length: int = 40) -> LanguageModel:
    mlp = MLP(8, 16) if isinstance(mixer, SoftmaxAttention) else None
    network = LanguageModel(mixer, vocab_size, n_layers=2, max_length=max_length, mlp=mlp)
    # Logits far enough apart that rounding decides no token.
    torch.nn.init.normal_(network.head.weight)
    return network.eval()


def make_model(network: LanguageModel) -> Any:
    from causalrn.interop.huggingface.configuration_causalrn import CausalRNConfig
    from causalrn.interop.huggingface.modeling_causalrn import CausalRNForCausalLM

    model = CausalRNForCausalLM(CausalRNConfig(describe(network)))
    model.load_state_dict(network.state_dict())
    return model.eval()


@pytest.fixture(params=MIXERS)
def make_mixer(request: pytest.FixtureRequest) -> Callable[[bool], Mixer]:
    return MIXERS[request.param]


@pytest.mark.parametrize("causal", [True, False])
def test_logits_and_gradients_are_the_networks(
    make_mixer, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from causalrn.interop.huggingface import mixers_causalrn

    # Several tiles and several parts.
    monkeypatch.setattr(mixers_causalrn, "TILE_ELEMENTS", 800)
    monkeypatch.setattr(mixers_causalrn, "PART", 4)
    network = make_network(make_mixer(causal))
    model = make_model(network)
    tokens = torch.randint(256, (2, 11))
    logits, expected = model(tokens).logits, network(tokens)
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients, expected_gradients = (
        {name: parameter.grad for name, parameter in m.named_parameters()} for m in (model, network)
    )
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-4, msg=name)


def test_generates_the_same_tokens(make_mixer) -> None:
    network = make_network(make_mixer(True))
    prompt = torch.randint(256, (2, 7))
    tokens = make_model(network).generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, 7:], generate(network, prompt, 20, temperature=0))


def test_left_padding_changes_nothing(make_mixer) -> None:
    network = make_network(make_mixer(True))
    prompts = [torch.randint(1, 256, (length,)) for length in (9, 3, 6)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    tokens = make_model(network).generate(
        padded, attention_mask=(padded != 0).long(), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(tokens[:, 9:], generate(network, prompts, 12, temperature=0))


def test_cached_steps_equal_the_whole(make_mixer) -> None:
    model = make_model(make_network(make_mixer(True)))
    tokens = torch.randint(256, (2, 12))
    with torch.no_grad():
        whole = model(tokens).logits
        cache: Any = None
        rows = []
        for part in tokens.split([5, 1, 1, 3, 2], dim=1):
            out = model(part, past_key_values=cache)
            cache, rows = out.past_key_values, [*rows, out.logits]
        assert_close(torch.cat(rows, 1), whole, atol=1e-5, rtol=1e-5)
        assert cache.get_seq_length() == 12
        assert_close(model(tokens, logits_to_keep=1).logits, whole[:, -1:])
        assert model(tokens, use_cache=False).past_key_values is None


def test_beam_search_finds_the_likelier_text(make_mixer) -> None:
    model = make_model(make_network(make_mixer(True)))
    prompt = torch.randint(256, (3, 5))

    def score(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            likelihoods = model(tokens[:, :-1]).logits.log_softmax(-1)
        return likelihoods.gather(-1, tokens[:, 1:, None])[:, 4:, 0].sum(1)

    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    # With as many beams as there are pairs of tokens to go wrong in, beam search cannot do worse here.
    greedy, best = (model.generate(prompt, num_beams=beams, **options) for beams in (1, 8))
    assert (score(best) >= score(greedy) - 1e-4).all()


def test_trains_with_labels() -> None:
    network = make_network(QuadraticRelation(8, 12))
    tokens = torch.randint(256, (2, 9))
    loss = make_model(network)(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(
        network(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert_close(loss, expected)


def test_mistakes_in_use_are_named() -> None:
    network = make_network(QuadraticRelation(8, 12))
    with pytest.raises(ValueError, match="position 40 .*max_position_embeddings=40"):
        make_model(network)(torch.zeros(1, 41, dtype=torch.int64))
    shifted = make_network(QuadraticRelation(8, 12, activation="official_elu"))
    tokens = torch.randint(256, (1, 9))
    assert_close(make_model(shifted)(tokens).logits, shifted(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="official_elu.*use_cache=False"):
        make_model(shifted).generate(tokens, max_new_tokens=2)


def write_checkpoint(path: Path, tokenizer: dict[str, Any], mixer: Mixer | None = None) -> Path:
    sizes = {"bytes": 256, "letters": 29, "numbers": 17}
    if tokenizer["kind"] == "bpe":
        vocab_size = BpeTokenizer(tokenizer["tokenizer_json"]).vocab_size
    else:
        vocab_size = sizes.get(tokenizer["kind"], 2 + len(tokenizer.get("characters", "")))
    network = make_network(mixer or QuadraticRelation(8, 12), vocab_size)
    save_network(network, path, {"tokenizer": tokenizer})
    return path


TEXTS = ["The people.\n\nAé🙂Ā \x00x", "", "<|endoftext|> <eos> abc", "  two  spaces"]
TOKENIZERS: dict[str, Callable[[], dict[str, Any]]] = {
    "bytes": lambda: BYTES,
    "letters": lambda: {"kind": "letters", "alphabet_size": 26},
    "numbers": lambda: {"kind": "numbers", "vocab_size": 17},
    "chars": lambda: CharTokenizer.train(["The people.\n Aé🙂 x"]).describe(),
    "bpe": lambda: BpeTokenizer.train(["The people of the States. The people."] * 3, 270).describe(),
}

# What a user does who has transformers and no causalrn.
SCRIPT = """
import json, sys
for name in ("causalrn", "datamodules", "lightning", "einops", "jaxtyping"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = [model.generate(torch.tensor([p]), max_new_tokens=15, do_sample=False)[0, len(p):].tolist() for p in prompts]
texts, has_tokenizer = json.loads(sys.argv[3]), sys.argv[4] == "True"
encoded = decoded = None
if has_tokenizer:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    encoded = [tokenizer(text).input_ids for text in texts]
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in encoded]
print(json.dumps({"tokens": tokens, "encoded": encoded, "decoded": decoded}))
"""


def run_without_causalrn(
    folder: Path, prompts: list[list[int]], texts: list[str], has_tokenizer: bool = True
) -> Any:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(folder),
            json.dumps(prompts),
            json.dumps(texts),
            str(has_tokenizer),
        ],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_folder_works_without_this_package(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from causalrn.evaluation.codec import make_codec

    description = TOKENIZERS[kind]()
    checkpoint = write_checkpoint(tmp_path / "model.ckpt", description)
    folder = tmp_path / "exported"
    export.main(["huggingface", "--checkpoint", str(checkpoint), "--output", str(folder)])
    assert "QuadraticRelation, 2 layers" in capsys.readouterr().out
    codec, network = make_codec(description), load_network(checkpoint)
    texts = ["abc", "zyx"] if kind == "letters" else TEXTS
    prompts = [[3, 4, 5], [6]]
    result = run_without_causalrn(folder, prompts, texts, kind != "numbers")
    for prompt, tokens in zip(prompts, result["tokens"], strict=True):
        expected = generate(network, torch.tensor([prompt]), 15, temperature=0, stop_tokens=codec.stop_tokens)
        assert tokens == expected[0].tolist()
    if kind != "numbers":
        assert result["encoded"] == [codec.encode(text) for text in texts]
        assert result["decoded"] == [
            codec.decode(row[1:-1] if kind == "letters" else row) for row in result["encoded"]
        ]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_there_and_back_is_bit_exact(kind: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(
        tmp_path / "model.ckpt", TOKENIZERS[kind](), LinearRelation(8, 12, n_heads=2)
    )
    export.main(["huggingface", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "there")])
    export.main(["import-huggingface", str(tmp_path / "there")])
    before, after = read_checkpoint(checkpoint), read_checkpoint(tmp_path / "there.ckpt")
    assert before["network"] == after["network"]
    assert before["tokenizer"] == after["tokenizer"]
    assert before["state_dict"].keys() == after["state_dict"].keys()
    assert all(
        torch.equal(after["state_dict"][name], weight) for name, weight in before["state_dict"].items()
    )
    export.main(
        ["huggingface", "--checkpoint", str(tmp_path / "there.ckpt"), "--output", str(tmp_path / "again")]
    )
    for path in (tmp_path / "there").iterdir():
        if path.name != "README.md":
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: export.main(args))
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


class OwnMixer(LinearRelation):
    """A user's own."""


def test_exports_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path / "model.ckpt", BYTES)
    own = write_checkpoint(tmp_path / "own.ckpt", BYTES, OwnMixer(8, 12))
    rotary = write_checkpoint(tmp_path / "rotary.ckpt", BYTES, SoftmaxAttention(8, 2, rotary=Rotary()))
    endless = LanguageModel(LinearRelation(8, 12), 256, n_layers=1, positions=NoPositions())
    save_network(endless, tmp_path / "endless.ckpt", {"tokenizer": BYTES})
    folder = tmp_path / "folder"
    assert "no Hugging Face form of mixer 'OwnMixer'" in error_of(
        ["huggingface", "--checkpoint", str(own), "--output", str(folder)], capsys
    )
    for path, wanted in ((rotary, "rotary 'Rotary'"), (tmp_path / "endless.ckpt", "positions 'NoPositions'")):
        args = ["huggingface", "--checkpoint", str(path), "--output", str(folder)]
        assert f"no Hugging Face form of {wanted}" in error_of(args, capsys)
    assert not folder.exists()
    folder.mkdir()
    (folder / "precious").write_text("content")
    assert "exists" in error_of(
        ["huggingface", "--checkpoint", str(checkpoint), "--output", str(folder)], capsys
    )
    assert (folder / "precious").read_text() == "content"
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'causalrn[huggingface]'" in error_of(
        ["huggingface", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "other")], capsys
    )


def test_imports_that_cannot_be_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "model.ckpt", BYTES)
    folder = tmp_path / "folder"
    args = ["import-huggingface", str(folder)]
    assert "config.json: no such file" in error_of(args, capsys)
    export.main(["huggingface", "--checkpoint", str(checkpoint), "--output", str(folder)])
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:1000])
    assert "model.safetensors is truncated" in error_of(args, capsys)
    weights.unlink()
    assert "no *.safetensors" in error_of(args, capsys)
    weights.write_bytes(whole)
    config.write_text(json.dumps({"model_type": "gpt2"}))
    assert "model of type 'gpt2'" in error_of(args, capsys)
    config.write_text("{")
    assert "no JSON" in error_of(args, capsys)
    settings["network"]["init_args"]["vocab_size"] = 255
    config.write_text(json.dumps(settings))
    assert "do not fit" in error_of(args, capsys)
    (tmp_path / "folder.ckpt").write_text("precious")
    assert "exists" in error_of(args, capsys)
