"""The exported step of the linear form gives the network's tokens, in torch.export and in ONNX, without this package."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from causalrn import export
from causalrn.interop.step_export import LinearStep, export_program
from causalrn.models import LanguageModel, LinearRelation, QuadraticRelation, TokenShift
from causalrn.models.decoding import GREEDY, generate
from causalrn.training.checkpoint import save_network
from causalrn.training.errors import run_command

# torch's own use of its tree specs.
EXPORTING = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")


def make_network(max_length: int = 30) -> LanguageModel:
    network = LanguageModel(LinearRelation(16, 24, n_heads=2), 31, n_layers=2, max_length=max_length).eval()
    # Logits far enough apart that rounding decides no token.
    torch.nn.init.normal_(network.head.weight)
    return network


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_network(make_network(), tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_step_by_step_equals_forward() -> None:
    network = make_network()
    step, tokens = LinearStep(network), torch.randint(31, (3, 9))
    totals = step.init_totals(3)
    with torch.no_grad():
        expected = network(tokens)
        for position in range(9):
            logits, totals = step(tokens[:, position], torch.full((3,), position), totals)
            assert_close(logits, expected[:, position], atol=1e-5, rtol=1e-5)


@EXPORTING
@pytest.mark.slow
def test_exported_graph_is_plain() -> None:
    program = export_program(make_network())
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "causalrn" in name]
    inputs = (torch.tensor([3]), torch.tensor([0]), LinearStep(make_network()).init_totals(1))
    # Another batch size than that of the export.
    assert program.module()(*inputs)[0].shape == (1, 31)


def greedy(run, prompt: list[list[int]], totals, count: int) -> list[list[int]]:
    """Greedy tokens by a function from token, position and totals to logits and totals."""
    rows: list[list[int]] = [[] for _ in prompt]
    length = len(prompt[0])
    for position in range(length + count - 1):
        tokens = [p[position] if position < length else row[-1] for p, row in zip(prompt, rows, strict=True)]
        logits, totals = run(tokens, [position] * len(prompt), totals)
        if position >= length - 1:
            for row, values in zip(rows, logits, strict=True):
                row.append(int(values.argmax()))
    return rows


@EXPORTING
@pytest.mark.slow
def test_torch_export_runs_without_this_package(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "step.pt2"
    export.main(["step", "--checkpoint", str(checkpoint), "--output", str(path)])
    script = """
import json, sys
for name in ("causalrn", "datamodules"):
    sys.modules[name] = None
import torch
step = torch.export.load(sys.argv[1]).module()
totals = torch.zeros(2, 1, 2, 12)
for position, token in enumerate([3, 1, 4, 1, 5]):
    logits, totals = step(torch.tensor([token]), torch.tensor([position]), totals)
print(json.dumps(logits[0].tolist()))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    from causalrn.training.checkpoint import load_network

    expected = load_network(checkpoint)(torch.tensor([[3, 1, 4, 1, 5]]))[0, -1]
    assert_close(torch.tensor(json.loads(done.stdout)), expected.detach(), atol=1e-5, rtol=1e-5)


@EXPORTING
@pytest.mark.slow
def test_onnx_gives_the_same_tokens(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    import numpy as np

    from causalrn.training.checkpoint import load_network

    path = tmp_path / "step.onnx"
    export.main(["step", "--checkpoint", str(checkpoint), "--output", str(path)])
    assert "token, position, totals -> logits, new_totals" in capsys.readouterr().out
    session = runtime.InferenceSession(path)

    def run(token, position, totals):
        return session.run(None, {"token": np.array(token), "position": np.array(position), "totals": totals})

    prompt = torch.randint(31, (3, 5))
    totals = np.zeros((2, 3, 2, 12), dtype=np.float32)
    expected = generate(load_network(checkpoint), prompt, 20, GREEDY)
    assert greedy(run, prompt.tolist(), totals, 20) == expected.tolist()


@pytest.mark.slow
def test_refusals(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(path: Path, output: Path) -> str:
        with pytest.raises(SystemExit) as exit_info:
            run_command(lambda: export.main(["step", "--checkpoint", str(path), "--output", str(output)]))
        assert exit_info.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    quadratic = tmp_path / "quadratic.ckpt"
    save_network(LanguageModel(QuadraticRelation(8, 12), 31, n_layers=1, max_length=9), quadratic)
    assert "got QuadraticRelation(causal=True)" in error(quadratic, tmp_path / "step.pt2")
    others: tuple[tuple[str, dict[str, Any]], ...] = (
        ("LinearRelation + QuadraticRelation", {"mixer": [LinearRelation(8, 8), QuadraticRelation(8, 8)]}),
        (
            "LinearRelation behind TokenShift",
            {"mixer": LinearRelation(8, 8), "short_convolution": TokenShift()},
        ),
    )
    for name, settings in others:
        other = tmp_path / "other.ckpt"
        save_network(LanguageModel(vocab_size=31, n_layers=2, max_length=9, **settings), other)
        assert f"got {name}(causal=True)" in error(other, tmp_path / "step.pt2")
    assert "must end in .onnx or .pt2: got step.bin" in error(checkpoint, tmp_path / "step.bin")
    (tmp_path / "step.pt2").write_text("precious")
    assert "exists" in error(checkpoint, tmp_path / "step.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'causalrn[onnx]'" in error(checkpoint, tmp_path / "step.onnx")
