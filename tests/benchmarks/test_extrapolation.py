"""Measuring copies beyond the training length: what counts, where mistakes are, and that one pass equals decoding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks.__main__ as bench
from benchmarks.extrapolation import check, explain, letters_of, measure, predict, summarise, wanted
from causalrn.models import LanguageModel, LinearRelation, NoPositions, ShortConvolution
from causalrn.training.checkpoint import save_network
from datamodules.tasks.strings import EOS


def make_network() -> LanguageModel:
    return LanguageModel(
        LinearRelation(8, 12),
        vocab_size=7,
        n_layers=1,
        positions=NoPositions(),
        short_convolution=ShortConvolution(8, 3),
    ).eval()


class Copier(LanguageModel):
    """Answers rightly, but for one letter of the second string."""

    def __init__(self) -> None:
        super().__init__(LinearRelation(4, 4), vocab_size=7, n_layers=1, positions=NoPositions())

    def unembed(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.one_hot(wanted(letters_of(self, x.shape[1] - 1, 0, len(x))), 7)
        logits[1, 2] = logits[1, 2].roll(1)
        return logits.float()


def test_first_mistakes_and_their_contexts() -> None:
    letters = np.array([3, 4, 5, 6, 3, 4, 5, 3, EOS])
    # 3 4 5 stands before 6 and before the 3 in the end.
    guesses = letters.copy()
    guesses[7] = 6
    assert explain(letters, guesses, 7) == (7, 3, 3)
    # No 6 stands behind a 3.
    guesses[5] = 6
    assert explain(letters, guesses, 5) == (5, 0, 1)


def test_strings_are_right_as_a_whole_or_not_at_all() -> None:
    row = measure(Copier().eval(), 5, 4, batch_positions=1000)
    assert row["exact_match"] == 0.75
    assert row["character_accuracy"] == pytest.approx(23 / 24)
    assert [mistake["position"] for mistake in row["first_mistakes"]] == [2]


def test_the_summary_is_over_checkpoints() -> None:
    rows = [
        {"length": length, "exact_match": match}
        for length, match in ((8, 1.0), (16, 0.5), (8, 0.9), (16, 0.7))
    ]
    assert [tuple(line.values()) for line in summarise(rows)] == [
        (8, 2, pytest.approx(0.95), 0.9),
        (16, 2, pytest.approx(0.6), 0.5),
    ]


def test_batches_do_not_change_the_result() -> None:
    network = make_network()
    one, many = (measure(network, 6, 5, size) for size in (1, 1000))
    assert {**one, "seconds_per_string": 0} == {**many, "seconds_per_string": 0}
    assert one["exact_match"] == 0


def test_one_pass_has_the_first_mistakes_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = make_network()
    check(network, 6)
    right, _ = predict(network, letters_of(network, 6, 0, 4))
    assert not right.all()
    answers = wanted(letters_of(network, 6, 0, 4))
    monkeypatch.setattr("benchmarks.extrapolation.generate", lambda *_, **__: answers)
    with pytest.raises(RuntimeError, match="other first mistakes"):
        check(network, 6)


def test_the_record_names_runs_and_not_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "seed1" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    save_network(make_network(), path)
    args = ["--lengths", "4,8", "--samples", "3,2", "--output", str(tmp_path / "records"), "--name", "tiny"]
    bench.main(["extrapolation", "--checkpoint", str(path), *args])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(row["checkpoint"], row["length"], row["strings"]) for row in record["rows"]]
    assert rows == [("seed1", 4, 3), ("seed1", 8, 2)]
    assert sorted(file.suffix for file in (tmp_path / "records").iterdir()) == [".json", ".png"]
