"""The charts of a report, and its figures as files."""

from pathlib import Path

import pytest
from PIL import Image

from causalrn import report
from causalrn.reporting.figures import Chart, draw_panels, spans_decades


@pytest.mark.slow
def test_figures_are_written_as_png_and_svg(runs: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    report.main(
        [
            str(runs),
            "--output",
            str(tmp_path / "r.html"),
            "--metrics",
            "train/loss",
            "--figures",
            str(figures),
        ]
    )
    assert {path.stem for path in figures.glob("*.png")} == {path.stem for path in figures.glob("*.svg")}
    assert {path.stem for path in figures.glob("*.svg")} == {
        "train_loss",
        "copying_over_steps",
        "copying_over_length",
        "ablation",
    }
    with Image.open(figures / "ablation.png") as image:
        colours = image.convert("RGB").resize((60, 40)).getcolors(2400)
        assert colours is not None
        assert len(colours) > 10


def test_charts_are_drawn_of_what_is_finite(tmp_path: Path) -> None:
    nan = float("nan")
    chart = Chart(
        "a", "curves", draw_panels({"loss": [("one", [(0, nan), (1, 2.0), (2, 3.0)])]}, ["one"], "step")
    )
    text = chart.svg()
    assert text.startswith("<svg")
    assert "nan" not in text
    assert ">one<" in text
    assert spans_decades([("one", [(0, 1.0), (1, nan), (2, 100.0)])])
    assert not spans_decades([("one", [(0, 0.0), (1, 100.0)])])
