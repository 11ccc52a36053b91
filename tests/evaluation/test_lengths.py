"""The length ladder against networks whose mistakes are known, within its bounds, and from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalrn import evaluate
from causalrn.evaluation.length_report import draw_ladder, read_table, table_rows, write_table
from causalrn.evaluation.lengths import Bounds, Ladder, climb, powers_of_two
from causalrn.models import LanguageModel, LinearRelation, QuadraticRelation
from causalrn.training.checkpoint import save_network
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.tasks.copying import CopyDataModule
from datamodules.tasks.module import TaskDataModule
from datamodules.tasks.string_tasks import DuplicatedNgrams
from datamodules.text import TextDataModule
from datamodules.tokenizers import ByteTokenizer
from tests.test_fit import error_of

CPU = torch.device("cpu")


class Copier(nn.Module):
    """Copies without a mistake but from the answer's token `wrong_from` on, and remembers the sizes of its batches."""

    def __init__(self, wrong_from: int) -> None:
        super().__init__()
        self.wrong_from = wrong_from
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.shapes.append(tuple(tokens.shape))
        length = tokens.shape[1] // 2 - 1
        # What a position predicts stands `length` before it, and EOS comes last.
        predicted = torch.roll(tokens, length, 1)
        predicted[:, -1] = 2
        predicted[:, length + 1 + self.wrong_from :] = 0
        return 10 * F.one_hot(predicted, 29).float()


def climb_copying(network: nn.Module, lengths: list[int], **bounds: Any) -> Ladder:
    return climb(network, CopyDataModule(length=[4, 8]), lengths, Bounds(**bounds), device=CPU)


def test_metrics_of_known_mistakes() -> None:
    ladder = climb_copying(Copier(wrong_from=10), [4, 8, 16], samples=20)
    assert not ladder.ended
    metrics = ladder.metrics()
    for length in (4, 8):
        assert metrics[f"val/exact_match/length_{length}"] == 1
        assert metrics[f"val/first_error/length_{length}"] == length + 1
    assert metrics["val/exact_match/length_16"] == 0
    assert metrics["val/character_accuracy/length_16"] == pytest.approx(10 / 16)
    assert metrics["val/copy_accuracy/length_16"] == 0
    assert metrics["val/first_error/length_16"] == 10
    assert metrics["val/loss/length_8"] < 0.01
    assert metrics["val/loss/length_16"] > 1
    assert [rung.samples for rung in ladder.rungs] == [20] * 3
    assert ladder.rungs[2].first_errors == [10] * 20


def test_the_batch_shrinks_with_the_length() -> None:
    network = Copier(0)
    climb_copying(network, [4, 16, 100], samples=6, tokens_per_batch=100)
    assert network.shapes == [(6, 10), (2, 34), (2, 34), (2, 34), *[(1, 202)] * 6]
    network.shapes.clear()
    climb_copying(network, [4], samples=6, rows_per_batch=4)
    assert network.shapes == [(4, 10), (2, 10)]


def test_time_ends_the_ladder() -> None:
    ladder = climb_copying(Copier(0), [4, 8], samples=6, rows_per_batch=2, max_seconds=1e-9)
    assert [(rung.length, rung.samples) for rung in ladder.rungs] == [(4, 2)]
    assert ladder.ended == "the 1e-09 seconds were over after 2 samples of length 4"
    ladder = climb_copying(Copier(0), [4, 8], samples=6, max_seconds=1e-9)
    assert [rung.samples for rung in ladder.rungs] == [6]
    assert "over after 6 samples of length 4" in ladder.ended


def test_learned_positions_end_the_ladder() -> None:
    network = LanguageModel(QuadraticRelation(8, 8), vocab_size=29, n_layers=1, max_length=34)
    ladder = climb_copying(network, [4, 8, 16, 32, 64], samples=3)
    assert [rung.length for rung in ladder.rungs] == [4, 8, 16]
    assert ladder.ended.startswith("the network does not run at length 32: sequence of 66 positions")
    assert ladder.ended.endswith("the ladder ends at 16")
    assert climb_copying(network, [32], samples=3).rungs == []


def test_a_task_without_samples_of_a_length_ends_the_ladder() -> None:
    data = TaskDataModule(DuplicatedNgrams(n_gram=4), length=8)
    ladder = climb(Copier(99), data, [4, 8], Bounds(), device=CPU)
    assert ladder.rungs == []
    assert ladder.ended.startswith("there are no samples of length 4: length must be at least 8")
    assert powers_of_two(data, 1) == [8]
    assert powers_of_two(data, 6) == [8, 16, 32]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    text = tmp_path / "corpus.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 400)
    settings = PackSettings(tokenizer=ByteTokenizer().describe(), val_fraction=0.2, test_fraction=0.1)
    prepare(plan_files([str(text)], settings), str(tmp_path / "shards"))
    return tmp_path / "shards"


def test_text_has_losses_by_position(shards: Path, tmp_path: Path) -> None:
    data = TextDataModule(str(shards), context_length=16)
    network = LanguageModel(LinearRelation(8, 8), vocab_size=256, n_layers=1, max_length=100).eval()
    ladder = climb(network, data, [16, 32, 96, 128], Bounds(samples=12), device=CPU)
    assert [(rung.length, rung.samples) for rung in ladder.rungs] == [(16, 12), (32, 6), (96, 2)]
    assert "the network does not run at length 128" in ladder.ended
    samples, _ = data.length_samples("val", 96)
    batch = samples.expand(samples.read(torch.arange(2).numpy()))
    with torch.no_grad():
        logits = network(batch["tokens"])
    nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none").view(2, 96)
    metrics = ladder.metrics(context=16)
    assert metrics["val/loss/length_96"] == pytest.approx(nats.mean().item(), rel=1e-5)
    for start, stop in ((0, 16), (16, 32), (32, 64), (64, 96)):
        expected = nats[:, start:stop].mean().item()
        assert metrics[f"val/loss/positions_{start}_{stop}"] == pytest.approx(expected, rel=1e-5)
    rows = table_rows(ladder, step=7, context=16)
    write_table(tmp_path / "table.csv", rows)
    assert [row["length"] for row in read_table(tmp_path / "table.csv")][-2:] == ["32-64", "64-96"]
    draw_ladder(tmp_path / "picture.png", ladder, data.training_lengths, "text", context=16)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_table_tells_where_mistakes_are(tmp_path: Path) -> None:
    ladder = climb_copying(Copier(5), [4, 8], samples=3)
    write_table(tmp_path / "table.csv", table_rows(ladder))
    short, long = read_table(tmp_path / "table.csv")
    assert (short["wrong"], short["median_error"], short["first_error"]) == ("0", "", "5.0")
    assert (long["wrong"], long["earliest_error"], long["median_error"]) == ("3", "5", "5")
    assert float(long["character_accuracy"]) == pytest.approx(5 / 8)
    assert "step" not in short


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"tokens_per_batch": 0}, {"max_seconds": 0}])
def test_bounds_that_nothing_fits_into(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be .*got 0"):
        Bounds(**arguments)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A network of two tasks' size, and the config of its data."""
    network = LanguageModel(QuadraticRelation(8, 8), vocab_size=29, n_layers=1, max_length=40)
    data = {
        "class_path": "datamodules.tasks.module.TaskDataModule",
        "init_args": {
            "task": {"class_path": "datamodules.tasks.string_tasks.Reverse"},
            "length": 8,
            "val_samples": 7,
        },
    }
    path = tmp_path / "network.ckpt"
    save_network(network, path, {"config": {"data": data}})
    return path


def test_the_command_line_climbs_any_task(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--checkpoint", str(checkpoint), "--accelerator", "cpu"]
    evaluate.main([*base, "--lengths", "4,8,16,32", "--tokens-per-batch", "64"])
    printed = capsys.readouterr()
    assert "the network does not run at length 32" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert "length 16" in printed.out
    metrics = json.loads(checkpoint.with_name("evaluation-network-lengths.json").read_text())["metrics"]
    assert "val/first_error/length_16" in metrics
    rows = read_table(checkpoint.with_name("evaluation-network-lengths.csv"))
    assert [(row["length"], row["samples"]) for row in rows] == [("4", "7"), ("8", "7"), ("16", "7")]
    assert checkpoint.with_name("evaluation-network-lengths.png").read_bytes()[:4] == b"\x89PNG"
    # The numbers of an ordinary validation on the same strings.
    evaluate.main(base)
    validated = json.loads(checkpoint.with_name("evaluation-network.json").read_text())["metrics"]
    for name, value in validated.items():
        assert metrics[f"{name}/length_8"] == pytest.approx(value), name


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--lengths", "64,128"], "does not run at length 64"),
        (["--lengths", "8", "--val-samples", "0"], "--val-samples must be at least 1: got 0"),
        (["--lengths", "8", "--tokens-per-batch", "0"], "--tokens-per-batch must be at least 1: got 0"),
        (["--lengths", "8", "--max-seconds", "-1"], "--max-seconds must be above 0: got -1"),
        (["--lengths", "16777216"], "there are no samples of length 16777216"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], wanted: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--checkpoint", str(checkpoint), "--accelerator", "cpu", *arguments]
    assert wanted in error_of(evaluate.main, args, capsys)
