"""The page of results is made of the records, and broken records are named."""

from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import results_page
from causalrn.training.errors import run_command


def test_results_show_tables_pictures_and_links(tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    record = """{"benchmark": "relation", "heads": 2, "rows": [{"name": "a", "seconds": {"forward": 0.12345}}],
                 "machine": {"gpu": "NVIDIA H200", "torch": "2.13.0", "command": "python -m benchmarks x"}}"""
    (records / "2026-01-02_relation.json").write_text(record)
    (records / "2026-01-02_relation.png").touch()
    (records / "2026-01-03_copying.csv").write_text("model,exact_match\nquadratic|exp,0.98\n")
    page = results_page(records, tmp_path / "docs")
    assert "2026-01-02, NVIDIA H200, torch 2.13.0 ([record](../records/2026-01-02_relation.json))" in page
    assert "    python -m benchmarks x" in page
    assert "| a | 0.123 |" in page
    assert "![relation](../records/2026-01-02_relation.png)" in page
    assert "| model | exact match |" in page
    assert "| quadratic\\|exp | 0.98 |" in page
    assert page.index("## copying") < page.index("## relation")


@pytest.mark.parametrize(
    ("text", "wanted"), [(None, "holds no records"), ("{", "is no record"), ("[1]", "got list")]
)
def test_broken_records_are_named(
    text: str | None, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "2026-01-02_x.json").write_text(text)
    args = ["--benchmarks", str(tmp_path), "--output", str(tmp_path / "page.md")]
    with pytest.raises(SystemExit):
        run_command(lambda: results.main(args))
    (line,) = capsys.readouterr().err.splitlines()
    assert wanted in line
    assert not (tmp_path / "page.md").exists()
