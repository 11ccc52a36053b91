"""The pages in docs/: every command and Python block runs, links lead somewhere, and the page of results is up to date."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.results import results_page
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


@pytest.mark.slow
def test_the_picture_of_the_model_is_drawn_by_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "model.png"
    monkeypatch.setattr(sys, "argv", ["model.py", "--output", str(output)])
    runpy.run_path(str(DOCS / "images" / "model.py"), run_name="__main__")
    assert output.read_bytes()[:4] == b"\x89PNG"
