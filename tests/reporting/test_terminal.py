"""Final numbers as a table on the terminal."""

import pytest

from causalrn.reporting.terminal import print_results


def test_a_row_for_each_set_and_a_column_for_each_metric(capsys: pytest.CaptureFixture[str]) -> None:
    results = {"val/loss/length_8": 0.12345, "val/exact_match/length_8": 1.0, "val/loss/length_16": 2.0}
    print_results(results, {"xz": 2.293})
    header, _, *rows = (line.split() for line in capsys.readouterr().out.splitlines() if line.strip())
    assert header == ["exact", "match", "loss"]
    assert rows == [["length", "8", "1.000", "0.1235"], ["length", "16", "2.0000"], ["xz"]]


def test_other_methods_stand_below_bits_per_byte(capsys: pytest.CaptureFixture[str]) -> None:
    print_results({"val/bits_per_byte": 2.5, "val/loss": 1.7}, {"unigram_entropy": 4.3181})
    *_, last = (line.split() for line in capsys.readouterr().out.splitlines() if line.strip())
    assert last == ["unigram", "entropy", "4.318"]


def test_nothing_is_printed_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_results({})
    assert not capsys.readouterr().out
