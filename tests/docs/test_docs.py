"""The pages in docs/: every command and Python block runs, links lead somewhere, and the page of results is up to date."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import results_page
from causalrn.training.errors import run_command
from tests.commands import ROOT, blocks, run_page

# In this order, in one folder: later pages use the runs of earlier ones.
PAGES = ["start.md", "experiments.md", "metrics.md", "model.md"]
# Pages whose commands need more than one process, a cluster or a network.
ELSEWHERE = {
    "data.md": "tests/datamodules/test_docs.py",
    "decoding.md": "tests/docs/test_decoding.py",
    "positions.md": "tests/benchmarks/test_extrapolation.py",
    "sweeps.md": "tests/sweeps/test_sweep.py",
    "cluster.md": "tests/slurm",
}
DOCS = ROOT / "docs"


def test_every_page_with_commands_is_run_somewhere() -> None:
    pages = {page.name for page in DOCS.glob("*.md") if any(k == "sh" for k, _ in blocks(page.read_text()))}
    assert set(PAGES) <= pages
    for name in pages - set(PAGES):
        assert name in ELSEWHERE, f"no test runs the commands of docs/{name}"
        assert (ROOT / ELSEWHERE[name]).exists(), name


@pytest.mark.slow
# A resumed run knows its folder by the absolute path.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Modules that a page writes are importable, as with `python -m`.
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("configs", "benchmarks", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in PAGES:
        assert run_page((DOCS / name).read_text()) > 0, name
    for left in ("pairs.png", "inside.png", "model.png", "runs/short/results.json", "docs/results.md"):
        assert (tmp_path / left).exists(), left
    sys.modules.pop("running_mean")


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists() or target in ELSEWHERE, f"{page}: {target}"


def test_the_page_of_results_is_up_to_date() -> None:
    page = results_page(ROOT / "benchmarks", DOCS)
    assert (DOCS / "results.md").read_text() == page, "python -m benchmarks.results"


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


@pytest.mark.slow
def test_the_picture_of_the_model_is_drawn_by_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model.png"
    monkeypatch.setattr(sys, "argv", ["model.py", "--output", str(output)])
    runpy.run_path(str(DOCS / "images" / "model.py"), run_name="__main__")
    assert output.read_bytes()[:4] == b"\x89PNG"
