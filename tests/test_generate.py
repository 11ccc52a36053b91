"""The command that continues a prompt: what it prints, how it ends, and what it says to mistakes."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from causalrn import generate
from causalrn.models import LanguageModel, LinearRelation, QuadraticRelation
from causalrn.models.decoding import GREEDY
from causalrn.models.decoding import generate as generate_tokens
from causalrn.training.checkpoint import load_network, save_network
from causalrn.training.errors import run_command

TEXT = {"TextDataModule": {"task": "text", "tokenizer": {"kind": "bytes"}}, "config": {}}


def write_checkpoint(path: Path, vocab_size: int, max_length: int, **content: Any) -> Path:
    network = LanguageModel(QuadraticRelation(8, 12), vocab_size, n_layers=2, max_length=max_length)
    torch.nn.init.normal_(network.head.weight)
    save_network(network, path, content)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "text.ckpt", 256, 40, **TEXT)


def output_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    capsys.readouterr()
    generate.main(args)
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.slow
def test_prints_what_the_model_generates(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--checkpoint", str(checkpoint), "--prompt", "hello"]
    out, err = output_of([*args, "--max-tokens", "20", "--greedy"], capsys)
    prompt = torch.tensor([list(b"hello")])
    tokens = generate_tokens(load_network(checkpoint), prompt, 20, GREEDY, stop_tokens=[0])
    assert out == bytes(t for t in tokens[0].tolist() if t).decode("utf-8", "replace") + "\n"
    # 24 positions of two layers of 12 channels: the last token is never read.
    assert re.search(
        r"prompt of 5 tokens in \d+ ms, 20 tokens at [\d.]+ tokens/s, state 2,304 bytes \(2.3 kB\)", err
    )
    # The second is its former name.
    for flag in ("--cache-dtype", "--pool-dtype"):
        _, err = output_of([*args, "--max-tokens", "20", flag, "bfloat16", "--weights", "int8"], capsys)
        assert "state 1,152 bytes" in err


@pytest.mark.slow
def test_seed_decides_the_draw(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--checkpoint", str(checkpoint), "--prompt", "hello", "--top-p", "0.95", "--top-k", "50"]
    args += ["--repetition-penalty", "1.1", "--temperature", "0.9"]
    outputs = [output_of([*args, "--seed", seed], capsys)[0] for seed in ("1", "1", "2")]
    assert outputs[0] == outputs[1] != outputs[2]


def test_several_prompts_and_samples_have_headings(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--checkpoint", str(checkpoint), "--greedy", "--max-tokens", "15", "--samples", "2"]
    out, _ = output_of([*args, "--prompt", "one", "--prompt", "another"], capsys)
    headings = re.findall(r"^=== prompt (\d), sample (\d)$", out, flags=re.MULTILINE)
    assert headings == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    parts = re.split(r"\n?=== prompt \d, sample \d\n", out)[1:]
    alone, _ = output_of([*args[:-2], "--prompt", "another"], capsys)
    assert parts[2] + "\n" == parts[3] == alone


@pytest.mark.slow
def test_prompt_file_and_stop_string(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("hello")
    args = ["--checkpoint", str(checkpoint), "--greedy"]
    whole, _ = output_of([*args, "--prompt-file", str(tmp_path / "prompt.txt")], capsys)
    assert whole == output_of([*args, "--prompt", "hello"], capsys)[0]
    stop = whole[5:7]
    out, _ = output_of([*args, "--prompt", "hello", "--stop", stop], capsys)
    assert out == whole[: whole.index(stop)] + "\n"


def test_copy_task_speaks_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(
        tmp_path / "copy.ckpt", 29, 20, CopyDataModule={"task": "copy", "alphabet_size": 26}, config={}
    )
    args = ["--checkpoint", str(path)]
    out, err = output_of([*args, "--prompt", "abc"], capsys)
    tokens = generate_tokens(
        load_network(path), torch.tensor([[0, 3, 4, 5, 1]]), None, GREEDY, stop_tokens=[2]
    )[0].tolist()
    names = {0: "<BOS>", 1: "<SEP>", 2: ""}
    assert out == "".join(names.get(token, chr(ord("a") + token - 3)) for token in tokens) + "\n"
    assert "prompt of 5 tokens" in err
    out, _ = output_of([*args, "--prompt", "0 3 4 5 1", "--ids", "--max-tokens", "4"], capsys)
    assert out.split() == [str(token) for token in tokens[:4]]


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "x" * 41], "prompt of 41 tokens is longer than the model's max_length=40"),
        (["--prompt", "x" * 30, "--max-tokens", "20"], "need 49 positions; the model has max_length=40"),
        (["--prompt", "300", "--ids"], "[0, 256): got 300"),
        (["--prompt", "x", "--ids"], "token ids"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--samples", "1000000000"], "memory are free"),
        (["--prompt-file", "no-such-file"], "no-such-file"),
        (["--prompt", "x", "--device", "bogus"], "--device bogus cannot be used: "),
        ([], "--prompt TEXT"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(
    args: list[str],
    wanted: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda: generate.main(["--checkpoint", str(checkpoint), *args]))
    assert exit_info.value.code == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert wanted in line
    assert not captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here_gets_one_line(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="--device cuda cannot be used: "):
        generate.main(["--checkpoint", str(checkpoint), "--prompt", "x", "--device", "cuda"])


def test_files_of_another_kind_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_checkpoint(tmp_path / "other.ckpt", 100, 40, **TEXT)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for args, wanted in (
        (["--checkpoint", str(other), "--prompt", "x"], "256 tokens and its network 100"),
        (
            ["--checkpoint", str(other), "--prompt-file", str(tmp_path / "latin.txt")],
            "latin.txt is not UTF-8",
        ),
        (["--checkpoint", str(tmp_path / "none.ckpt"), "--prompt", "x"], "no such file"),
    ):
        with pytest.raises(SystemExit):
            run_command(lambda args=args: generate.main(args))
        (line,) = capsys.readouterr().err.splitlines()
        assert wanted in line


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model with so many positions that it is still generating when a test looks."""
    network = LanguageModel(LinearRelation(8, 12), 256, n_layers=1, max_length=1_000_000)
    with torch.no_grad():
        # Always the same letter.
        network.head.weight.zero_()
        network.token_embedding.weight.zero_()
        weights = dict(network.named_parameters())
        weights["position_embedding.weight"].copy_(torch.tensor([1.0, -1.0] * 4).expand(1_000_000, 8))
        weights["blocks.0.mixer.out_proj.weight"].zero_()
        network.head.weight[ord("a")] = torch.tensor([1.0, -1.0] * 4)
    save_network(network, tmp_path / "endless.ckpt", TEXT)
    return tmp_path / "endless.ckpt"


@pytest.mark.slow
def test_ctrl_c_keeps_the_text_and_exits_with_130(endless: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "causalrn.generate",
        "--checkpoint",
        str(endless),
        "--prompt",
        "x",
        "--greedy",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        # Streamed: text is here long before the million tokens are.
        first = process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert re.fullmatch(rb"a{3,}\n", first + rest)
    assert len(first + rest) < 1_000_000
    (line,) = err.decode().splitlines()
    assert "tokens/s, state 52 bytes" in line


@pytest.mark.slow
def test_lines_typed_on_a_terminal_are_prompts(checkpoint: Path) -> None:
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "causalrn.generate", "--checkpoint", str(checkpoint), "--greedy"]
    command += ["--max-tokens", "5"]
    with subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.close(terminal)
        os.write(main, b"hello\n" + b"x" * 50 + b"\nhello\n\x04")
        out, err = process.communicate(timeout=300)
    os.close(main)
    assert process.returncode == 0
    tokens = generate_tokens(
        load_network(checkpoint), torch.tensor([list(b"hello")]), 5, GREEDY, stop_tokens=[0]
    )
    text = bytes(token for token in tokens[0].tolist() if token).decode("utf-8", "replace")
    assert out.decode().count(f"{text}\n") == 2
    assert err.decode().count("error: prompt of 50 tokens") == 1
