"""The table of results by length."""

from pathlib import Path

import pytest

from causalrn.evaluation.length_report import read_table, table_rows, write_table
from tests.evaluation.test_lengths import Copier, evaluate_copying


def test_the_table_tells_where_mistakes_are(tmp_path: Path) -> None:
    found = evaluate_copying(Copier(5), [4, 8], samples=3)
    write_table(tmp_path / "table.csv", table_rows(found))
    short, long = read_table(tmp_path / "table.csv")
    assert (short["wrong"], short["median_error"], short["first_error"]) == ("0", "", "5.0")
    assert (long["wrong"], long["earliest_error"], long["median_error"]) == ("3", "5", "5")
    assert float(long["character_accuracy"]) == pytest.approx(5 / 8)
    assert "step" not in short
