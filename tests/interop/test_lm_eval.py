"""lm-evaluation-harness on a checkpoint: scores and texts are the network's own, on a task that lies on this machine."""

import json
import os
import sys
from pathlib import Path
from typing import Any

# Before the libraries are imported: nothing here may look for a network.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
import yaml

from causalrn import evaluate
from causalrn.evaluation.codec import LetterCodec, TextCodec
from causalrn.models import LanguageModel, LinearRelation, QuadraticRelation
from causalrn.training.checkpoint import load_network, save_network
from causalrn.training.errors import run_command

pytest.importorskip("lm_eval", reason="the extra harness is not installed")
pytestmark = pytest.mark.slow

DOCUMENTS = [
    {"question": "The sky is", "choices": [" blue", " a fish"], "answer": 0},
    {"question": "Two and two are", "choices": [" five", " four"], "answer": 1},
    {"question": "é", "choices": [" x", " yz"], "answer": 0},
]


@pytest.fixture
def network() -> LanguageModel:
    network = LanguageModel(QuadraticRelation(8, 12), 256, n_layers=1, max_length=24)
    torch.nn.init.normal_(network.head.weight)
    return network.eval()


@pytest.fixture
def model(network: LanguageModel) -> Any:
    from causalrn.interop.lm_eval import CheckpointLM

    return CheckpointLM(network, TextCodec({"kind": "bytes"}), batch_size=2)


def requests_of(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # pyright: ignore[reportArgumentType]


def likelihood(network: LanguageModel, context: bytes, continuation: bytes) -> tuple[float, bool]:
    """Token by token, each from the context that is left of it."""
    total, greedy = 0.0, True
    for index, token in enumerate(continuation):
        logits = network(torch.tensor([[*context, *continuation[:index]]]))[0, -1].detach()
        total += float(logits.log_softmax(-1)[token])
        greedy = greedy and int(logits.argmax()) == token
    return total, greedy


def test_likelihoods_are_the_networks(network: LanguageModel, model: Any) -> None:
    best = int(network(torch.tensor([list(b"hello")]))[0, -1].argmax())
    pairs = [("a b", " cd"), ("hello", "x"), ("", "word"), ("longer context", " é!")]
    found = model.loglikelihood(requests_of("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        expected = likelihood(network, context.encode() or b"\0", continuation.encode())
        assert value == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    ((_, greedy),) = model._loglikelihood_tokens([(None, list(b"hello"), [best])])
    assert greedy


def test_long_contexts_lose_their_beginning(network: LanguageModel, model: Any) -> None:
    context = bytes(range(1, 60))
    ((value, _),) = model._loglikelihood_tokens([(None, list(context), list(b"ab"))])
    assert value == pytest.approx(likelihood(network, context[-23:], b"ab")[0], abs=1e-4)
    with pytest.raises(ValueError, match="25 tokens .* max_length=24"):
        model._loglikelihood_tokens([(None, [1], [2] * 25)])


def test_rolling_likelihood_predicts_every_token_once(network: LanguageModel, model: Any) -> None:
    text = "x" * 24 + "abcde"
    (value,) = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", [(text,)]))
    first = likelihood(network, b"\0", text[:24].encode())[0]
    # As much context as there are positions for.
    second = likelihood(network, text[4:24].encode(), b"abcde")[0]
    assert value == pytest.approx(first + second, abs=1e-3)


def test_generates_until_a_stop_string(network: LanguageModel, model: Any) -> None:
    from causalrn.models.decoding import GREEDY, generate

    settings = {"until": [], "max_gen_toks": 10}
    (free,) = model.generate_until(requests_of("generate_until", [("hello", settings)]))
    tokens = generate(network, torch.tensor([list(b"hello")]), 10, GREEDY, stop_tokens=[0])[0].tolist()
    assert free == bytes(token for token in tokens if token).decode("utf-8", "replace")
    stop = free[2:4]
    contexts = ["hello", "", "other words that are longer than the room left"]
    texts = model.generate_until(
        requests_of("generate_until", [(text, {**settings, "until": [stop]}) for text in contexts])
    )
    assert texts[0] == free[: free.index(stop)]
    assert all(stop not in text for text in texts)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task and its data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    task = {
        "task": "small_choice",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "data.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "small_choice.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_the_command_runs_a_local_task(
    network: LanguageModel, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_network(network, tmp_path / "model.ckpt", {"tokenizer": {"kind": "bytes"}})
    args = [
        "--checkpoint",
        str(tmp_path / "model.ckpt"),
        "--tasks",
        "small_choice",
        "--include-path",
        str(tasks),
    ]
    evaluate.main([*args, "--output", str(tmp_path / "results.json")])
    network = load_network(tmp_path / "model.ckpt")
    right = 0
    for document in DOCUMENTS:
        scores = [
            likelihood(network, document["question"].encode(), choice.encode())[0]
            for choice in document["choices"]
        ]
        right += scores.index(max(scores)) == document["answer"]
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert metrics == {"acc/small_choice": pytest.approx(right / len(DOCUMENTS))}
    assert "small choice" in capsys.readouterr().out


def test_tasks_that_cannot_be_are_refused(
    network: LanguageModel, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from causalrn.interop.lm_eval import CheckpointLM

    def error(*args: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            run_command(lambda: evaluate.main(["--checkpoint", str(tmp_path / "model.ckpt"), *args]))
        assert exit_info.value.code == 1
        return capsys.readouterr().err.splitlines()[-1]

    save_network(network, tmp_path / "model.ckpt", {"tokenizer": {"kind": "bytes"}})
    assert "no task no_such_task" in error("--tasks", "no_such_task")
    letters = LanguageModel(LinearRelation(8, 12), 29, n_layers=1, max_length=24)
    with pytest.raises(ValueError, match="trained on text"):
        CheckpointLM(letters, LetterCodec(26), 2)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'causalrn[harness]'" in error("--tasks", "no_such_task")
