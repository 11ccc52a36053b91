"""The command that imports official weights: a checkpoint of ours with the same logits, and clear refusals."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from causalrn import export
from causalrn.models import LanguageModel, LinearRelation, TokenShift
from causalrn.training.checkpoint import load_network
from causalrn.training.errors import run_command
from tests.interop.official_reference import make_state_dict, official_logits


def settings_of(flags: list[str]) -> dict[str, Any]:
    """What the flags mean to the reference."""
    given = {flag: value for flag, value in pairwise([*flags, ""]) if flag.startswith("--")}
    settings: dict[str, Any] = {"causal": "--bidirectional" not in given}
    settings["post_norm"] = "--no-post-norm" not in given
    settings["n_heads"] = int(given.get("--n-heads", 1))
    settings["eps"] = float(given.get("--eps", 0))
    names = {"--norm": "norm", "--activation": "activation", "--pre-norm": "pre_norm"}
    return settings | {names[flag]: value for flag, value in given.items() if flag in names}


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("transformer", []),
        ("linear_transformer", []),
        ("relation", ["--model", "relation"]),
        ("relation", ["--model", "relation", "--n-heads", "2", "--norm", "rms", "--eps", "0.01"]),
        ("linear_relation", ["--model", "linear_relation", "--n-heads", "4", "--bidirectional"]),
        ("relation_ablation", ["--activation", "relu", "--no-post-norm"]),
        ("relation_ablation", ["--pre-norm", "approx", "--n-heads", "4"]),
    ],
)
def test_imported_checkpoint_gives_the_official_logits(model: str, flags: list[str], tmp_path: Path) -> None:
    weights = make_state_dict(model)
    torch.save({f"_orig_mod.{key}": tensor for key, tensor in weights.items()}, tmp_path / "weights.pth")
    export.main(["import-official", str(tmp_path / "weights.pth"), *flags])
    tokens = torch.randint(11, (2, 10))
    settings = settings_of(flags)
    logits = load_network(tmp_path / "weights.ckpt")(tokens)
    assert_close(logits.detach(), official_logits(weights, tokens, model, **settings), atol=1e-5, rtol=1e-5)


def test_a_short_convolution_is_named_with_its_mixer() -> None:
    network = LanguageModel(LinearRelation(4, 4), 5, n_layers=1, max_length=4, short_convolution=TokenShift())
    assert export.describe_size(network).startswith("LinearRelation behind TokenShift, 1 layers, ")


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pth"

    def error(*flags: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            run_command(lambda: export.main(["import-official", str(path), *flags]))
        assert exit_info.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no such file" in error()
    torch.save(make_state_dict("relation"), path)
    assert "--model" in error()
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert "truncated" in error("--model", "relation")
    torch.save({"epoch": 3}, path)
    assert "no state dict" in error("--model", "relation")
    path.write_bytes(whole)
    assert "causal" in error("--model", "relation", "--bidirectional")
    assert "want eps=0" in error("--model", "linear_relation", "--eps", "0.01")
    assert "n_heads=5" in error("--model", "linear_relation", "--n-heads", "5")
    (tmp_path / "weights.ckpt").write_text("precious")
    assert "exists" in error("--model", "relation")
    assert (tmp_path / "weights.ckpt").read_text() == "precious"


@pytest.mark.slow
def test_scaled_heads_go_on_to_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the extra huggingface is not installed")
    torch.save(make_state_dict("relation"), tmp_path / "weights.pth")
    export.main(["import-official", str(tmp_path / "weights.pth"), "--model", "relation", "--n-heads", "2"])
    args = ["--checkpoint", str(tmp_path / "weights.ckpt"), "--output", str(tmp_path / "folder")]
    export.main(["huggingface", *args])
    assert "folder: QuadraticRelationScaledHeads, 2 layers" in capsys.readouterr().out
