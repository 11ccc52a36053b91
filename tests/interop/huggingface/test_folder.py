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
from causalrn.interop.huggingface.folder import write_folder
from causalrn.models import (
    MLP,
    Alibi,
    GatedMLP,
    HardAlibi,
    LanguageModel,
    LearnedLogLengthGain,
    LinearAttention,
    LinearRelation,
    LogMeanExpRelation,
    Mixer,
    NoPositions,
    PairBias,
    PositionalRelation,
    QuadraticRelation,
    QuadraticRelationScaledHeads,
    QuadraticRelationWithoutPostNorm,
    Rotary,
    ShortConvolution,
    SinusoidalPositions,
    SoftmaxAttention,
    TokenShift,
    describe,
)
from causalrn.models.decoding import GREEDY, generate
from causalrn.training.checkpoint import load_network, read_checkpoint, save_network
from causalrn.training.errors import run_command
from datamodules.tokenizers import BpeTokenizer, CharTokenizer

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.slow


def with_mixer(
    mixer: Mixer | list[Mixer], vocab_size: int = 256, max_length: int | None = 40, **settings: Any
):
    """A network whose logits are far enough apart that rounding decides no token."""
    network = LanguageModel(mixer, vocab_size, n_layers=2, max_length=max_length, **settings)
    torch.nn.init.normal_(network.head.weight)
    return network.eval()


def recipe(causal: bool) -> LanguageModel:
    """configs/copy/extrapolate.yaml in small."""
    gain, bias = LearnedLogLengthGain(2, reference=6.0), HardAlibi(2, 1)
    mixer = LogMeanExpRelation(8, 12, n_heads=2, causal=causal, gain=gain, bias=bias)
    endless = {"max_length": None, "positions": NoPositions()}
    return with_mixer(mixer, short_convolution=ShortConvolution(8, 3), **endless)


NETWORKS: dict[str, Callable[[bool], LanguageModel]] = {
    "quadratic": lambda c: with_mixer(QuadraticRelation(8, 12, n_heads=2, causal=c)),
    "approx gelu": lambda c: with_mixer(
        QuadraticRelation(8, 12, causal=c, pre_norm="approx", activation="gelu")
    ),
    "none relu": lambda c: with_mixer(QuadraticRelation(8, 12, causal=c, pre_norm="none", activation="relu")),
    "no post-norm": lambda c: with_mixer(QuadraticRelationWithoutPostNorm(8, 12, causal=c, norm="rms")),
    "scaled heads": lambda c: with_mixer(QuadraticRelationScaledHeads(8, 12, n_heads=2, causal=c, eps=1e-2)),
    "linear": lambda c: with_mixer(LinearRelation(8, 12, n_heads=3, causal=c)),
    "softmax": lambda c: with_mixer(SoftmaxAttention(8, n_heads=2, causal=c), mlp=MLP(8, 16)),
    "linear attention": lambda c: with_mixer(LinearAttention(8, n_heads=2, causal=c)),
    "recipe": recipe,
    "rotary, gated": lambda c: with_mixer(
        SoftmaxAttention(8, 2, causal=c, norm="rms", rotary=Rotary(), bias=PairBias([0.0, 0.3])),
        mlp=GatedMLP(8, 16),
        norm="rms",
        positions=SinusoidalPositions(),
    ),
    "alternating": lambda c: with_mixer(
        [LinearRelation(8, 12, causal=c), PositionalRelation(8, 10, 2, causal=c, bias=Alibi(2))],
        short_convolution=TokenShift(),
    ),
}
BYTES = {"kind": "bytes"}


def make_network(mixer: Mixer, vocab_size: int = 256) -> LanguageModel:
    return with_mixer(mixer, vocab_size)


def make_model(network: LanguageModel) -> Any:
    from causalrn.interop.huggingface.configuration_causalrn import CausalRNConfig
    from causalrn.interop.huggingface.modeling_causalrn import CausalRNForCausalLM

    model = CausalRNForCausalLM(CausalRNConfig(describe(network)))
    model.network.load_state_dict(network.state_dict())
    return model.eval()


@pytest.fixture(params=NETWORKS)
def make(request: pytest.FixtureRequest) -> Callable[[bool], LanguageModel]:
    return NETWORKS[request.param]


@pytest.mark.parametrize("causal", [True, False])
def test_logits_and_gradients_are_the_networks(make, causal: bool) -> None:
    network = make(causal)
    model = make_model(network)
    tokens = torch.randint(256, (2, 11))
    logits, expected = model(tokens).logits, network(tokens)
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients, expected_gradients = (
        {name: parameter.grad for name, parameter in m.named_parameters()} for m in (model.network, network)
    )
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], atol=1e-4, rtol=1e-4, msg=name)


def test_generates_the_same_tokens(make) -> None:
    network = make(True)
    prompt = torch.randint(256, (2, 7))
    tokens = make_model(network).generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, 7:], generate(network, prompt, 20, GREEDY))


def test_left_padding_changes_nothing(make) -> None:
    network = make(True)
    prompts = [torch.randint(1, 256, (length,)) for length in (9, 3, 6)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    tokens = make_model(network).generate(
        padded, attention_mask=(padded != 0).long(), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(tokens[:, 9:], generate(network, prompts, 12, GREEDY))


def test_cached_steps_equal_the_whole(make) -> None:
    model = make_model(make(True))
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


def test_beam_search_finds_the_likelier_text(make) -> None:
    model = make_model(make(True))
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
    with pytest.raises(ValueError, match="sequence of 41 positions .*max_length=40"):
        make_model(network)(torch.zeros(1, 41, dtype=torch.int64))
    shifted = make_network(QuadraticRelation(8, 12, activation="official_elu"))
    tokens = torch.randint(256, (1, 9))
    assert_close(make_model(shifted)(tokens).logits, shifted(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="official_elu depends on the length still to come"):
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
ALONE = """
import json, sys
for name in ("causalrn", "datamodules", "lightning", "einops", "jaxtyping"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, given = sys.argv[1], json.loads(sys.argv[2])
"""
TEXTS_ALONE = (
    ALONE
    + """
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
prompts, texts = given
tokens = [model.generate(torch.tensor([p]), max_new_tokens=15, do_sample=False)[0, len(p):].tolist() for p in prompts]
encoded = decoded = None
if texts is not None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    encoded = [tokenizer(text).input_ids for text in texts]
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in encoded]
print(json.dumps({"tokens": tokens, "encoded": encoded, "decoded": decoded}))
"""
)
NETWORKS_ALONE = (
    ALONE
    + """
results = {}
padded, whole = torch.tensor(given["padded"]), torch.tensor(given["whole"])
for name in given["names"]:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=0)
    tokens = model.generate(padded, attention_mask=(padded != 0).long(), **options)
    beams = model.generate(whole, num_beams=3, **options)
    model.train()
    model(whole, labels=whole).loss.backward()
    gradients = {key: float(p.grad.norm()) for key, p in model.named_parameters()}
    results[name] = {"tokens": tokens.tolist(), "beams": beams.tolist(), "gradients": gradients}
print(json.dumps(results))
"""
)


def run_without_causalrn(script: str, folder: Path, given: Any) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), json.dumps(given)],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_network_runs_without_this_package(tmp_path: Path) -> None:
    """Its tokens, left padding, beam search and gradients by the exported code alone are those of the package."""
    networks = {name.replace(" ", "_").replace(",", ""): make(True) for name, make in NETWORKS.items()}
    for name, network in networks.items():
        save_network(network, tmp_path / f"{name}.ckpt", {"tokenizer": BYTES})
        write_folder(tmp_path / f"{name}.ckpt", tmp_path / name)
    prompts = [torch.randint(1, 256, (length,)) for length in (9, 3, 6)]
    padded = torch.stack([torch.nn.functional.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    whole = torch.randint(1, 256, (2, 7))
    given = {"names": list(networks), "padded": padded.tolist(), "whole": whole.tolist()}
    results = run_without_causalrn(NETWORKS_ALONE, tmp_path, given)
    for name, network in networks.items():
        found = results[name]
        for row, prompt in zip(found["tokens"], prompts, strict=True):
            expected = generate(network, [prompt], 10, GREEDY, stop_tokens=[0])[0].tolist()
            # A row that has ended is padded with the token that ended it.
            assert row[9:][: len(expected)] == expected, name
        model = make_model(network)
        beams = model.generate(
            whole, num_beams=3, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=0
        )
        assert found["beams"] == beams.tolist(), name
        model.train()(whole, labels=whole).loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert found["gradients"][key] == pytest.approx(
                float(parameter.grad.norm()), rel=1e-3, abs=1e-6
            ), key


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
    result = run_without_causalrn(TEXTS_ALONE, folder, [prompts, None if kind == "numbers" else texts])
    for prompt, tokens in zip(prompts, result["tokens"], strict=True):
        expected = generate(network, torch.tensor([prompt]), 15, GREEDY, stop_tokens=codec.stop_tokens)
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
    folder = tmp_path / "folder"
    assert "test_folder.OwnMixer'; want classes of causalrn.models alone" in error_of(
        ["huggingface", "--checkpoint", str(own), "--output", str(folder)], capsys
    )
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
