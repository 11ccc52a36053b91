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

from causalrn import export
from causalrn.evaluation.codec import make_codec
from causalrn.interop.huggingface.folder import write_folder
from causalrn.models import LinearRelation, Mixer, QuadraticRelation
from causalrn.models.decoding import GREEDY, generate
from causalrn.training.checkpoint import load_network, read_checkpoint, save_network
from causalrn.training.errors import run_command
from datamodules.tokenizers import BpeTokenizer, CharTokenizer
from tests.interop.huggingface.networks import NETWORKS, make_model, make_network

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
pytestmark = pytest.mark.slow


BYTES = {"kind": "bytes"}


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
results = {}
for kind, texts in given["texts"].items():
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}", trust_remote_code=True)
    options = dict(max_new_tokens=15, do_sample=False)
    tokens = [model.generate(torch.tensor([p]), **options)[0, len(p):].tolist() for p in given["prompts"]]
    encoded = decoded = None
    if texts is not None:
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{kind}", trust_remote_code=True)
        encoded = [tokenizer(text).input_ids for text in texts]
        decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in encoded]
    results[kind] = {"tokens": tokens, "encoded": encoded, "decoded": decoded}
print(json.dumps(results))
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


def test_folders_of_every_tokenizer_work_without_this_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [[3, 4, 5], [6]]
    texts = {"letters": ["abc", "zyx"], "numbers": None}
    given = {"prompts": prompts, "texts": {kind: texts.get(kind, TEXTS) for kind in TOKENIZERS}}
    for kind, describe_tokenizer in TOKENIZERS.items():
        checkpoint = write_checkpoint(tmp_path / f"{kind}.ckpt", describe_tokenizer())
        export.main(["huggingface", "--checkpoint", str(checkpoint), "--output", str(tmp_path / kind)])
        assert "QuadraticRelation, 2 layers" in capsys.readouterr().out
    for kind, result in run_without_causalrn(TEXTS_ALONE, tmp_path, given).items():
        codec, network = make_codec(TOKENIZERS[kind]()), load_network(tmp_path / f"{kind}.ckpt")
        for prompt, tokens in zip(prompts, result["tokens"], strict=True):
            expected = generate(network, torch.tensor([prompt]), 15, GREEDY, stop_tokens=codec.stop_tokens)
            assert tokens == expected[0].tolist(), kind
        if kind != "numbers":
            assert result["encoded"] == [codec.encode(text) for text in given["texts"][kind]]
            rows = [row[1:-1] if kind == "letters" else row for row in result["encoded"]]
            assert result["decoded"] == [codec.decode(row) for row in rows]


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
