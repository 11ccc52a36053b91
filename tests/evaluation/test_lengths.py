"""Results by length of networks whose mistakes are known, within its bounds, and from the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalrn.evaluation.length_report import draw_lengths, read_table, table_rows, write_table
from causalrn.evaluation.lengths import Bounds, LengthResults, evaluate_lengths, powers_of_two
from causalrn.models import LanguageModel, LinearRelation, QuadraticRelation
from datamodules.prepare.packing import PackSettings
from datamodules.prepare.planning import plan_files
from datamodules.prepare.preparation import prepare
from datamodules.tasks.copying import CopyDataModule
from datamodules.tasks.module import TaskDataModule
from datamodules.tasks.string_tasks import DuplicatedNgrams
from datamodules.text import TextDataModule
from datamodules.tokenizers import ByteTokenizer

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


def evaluate_copying(network: nn.Module, lengths: list[int], **bounds: Any) -> LengthResults:
    return evaluate_lengths(network, CopyDataModule(length=[4, 8]), lengths, Bounds(**bounds), device=CPU)


def test_metrics_of_known_mistakes() -> None:
    found = evaluate_copying(Copier(wrong_from=10), [4, 8, 16], samples=20)
    assert not found.ended
    metrics = found.metrics()
    for length in (4, 8):
        assert metrics[f"val/exact_match/length_{length}"] == 1
        assert metrics[f"val/first_error/length_{length}"] == length + 1
    assert metrics["val/exact_match/length_16"] == 0
    assert metrics["val/character_accuracy/length_16"] == pytest.approx(10 / 16)
    assert metrics["val/copy_accuracy/length_16"] == 0
    assert metrics["val/first_error/length_16"] == 10
    assert metrics["val/loss/length_8"] < 0.01
    assert metrics["val/loss/length_16"] > 1
    assert [result.samples for result in found.results] == [20] * 3
    assert found.results[2].first_errors == [10] * 20


def test_the_batch_shrinks_with_the_length() -> None:
    network = Copier(0)
    evaluate_copying(network, [4, 16, 100], samples=6, tokens_per_batch=100)
    assert network.shapes == [(6, 10), (2, 34), (2, 34), (2, 34), *[(1, 202)] * 6]
    network.shapes.clear()
    evaluate_copying(network, [4], samples=6, rows_per_batch=4)
    assert network.shapes == [(4, 10), (2, 10)]


def test_time_ends_the_evaluation() -> None:
    found = evaluate_copying(Copier(0), [4, 8], samples=6, rows_per_batch=2, max_seconds=1e-9)
    assert [(result.length, result.samples) for result in found.results] == [(4, 2)]
    assert found.ended == "the 1e-09 seconds were over after 2 samples of length 4"
    found = evaluate_copying(Copier(0), [4, 8], samples=6, max_seconds=1e-9)
    assert [result.samples for result in found.results] == [6]
    assert "over after 6 samples of length 4" in found.ended


def test_learned_positions_end_the_evaluation() -> None:
    network = LanguageModel(QuadraticRelation(8, 8), vocab_size=29, n_layers=1, max_length=34)
    found = evaluate_copying(network, [4, 8, 16, 32, 64], samples=3)
    assert [result.length for result in found.results] == [4, 8, 16]
    assert found.ended.startswith("the network does not run at length 32: sequence of 66 positions")
    assert found.ended.endswith("the longest length is 16")
    assert evaluate_copying(network, [32], samples=3).results == []


def test_a_task_without_samples_of_a_length_ends_the_evaluation() -> None:
    data = TaskDataModule(DuplicatedNgrams(n_gram=4), length=8)
    found = evaluate_lengths(Copier(99), data, [4, 8], Bounds(), device=CPU)
    assert found.results == []
    assert found.ended.startswith("there are no samples of length 4: length must be at least 8")
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
    found = evaluate_lengths(network, data, [16, 32, 96, 128], Bounds(samples=12), device=CPU)
    assert [(result.length, result.samples) for result in found.results] == [(16, 12), (32, 6), (96, 2)]
    assert "the network does not run at length 128" in found.ended
    samples, _ = data.length_samples("val", 96)
    batch = samples.expand(samples.read(torch.arange(2).numpy()))
    with torch.no_grad():
        logits = network(batch["tokens"])
    nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none").view(2, 96)
    metrics = found.metrics(context=16)
    assert metrics["val/loss/length_96"] == pytest.approx(nats.mean().item(), rel=1e-5)
    for start, stop in ((0, 16), (16, 32), (32, 64), (64, 96)):
        expected = nats[:, start:stop].mean().item()
        assert metrics[f"val/loss/positions_{start}_{stop}"] == pytest.approx(expected, rel=1e-5)
    rows = table_rows(found, step=7, context=16)
    write_table(tmp_path / "table.csv", rows)
    assert [row["length"] for row in read_table(tmp_path / "table.csv")][-2:] == ["32-64", "64-96"]
    draw_lengths(tmp_path / "picture.png", found, data.training_lengths, "text", context=16)
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments", [{"samples": 0}, {"tokens_per_batch": 0}, {"max_seconds": 0}])
def test_bounds_that_nothing_fits_into(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be .*got 0"):
        Bounds(**arguments)
