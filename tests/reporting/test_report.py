"""The report of runs: what the page shows in a real browser, the figures, and what it says to folders that are not whole."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from causalrn import report
from causalrn.reporting import facts, views
from causalrn.reporting.figures import Chart, draw_panels, spans_decades
from causalrn.reporting.runs import find_runs
from tests.test_fit import CONFIG, error_of

MIXERS = {"quadratic": "QuadraticRelation", "transformer": "SoftmaxAttention"}


def make_run(folder: Path, mixer_class: str, length: int, accuracy: float, **settings: Any) -> Path:
    """A run folder as causalrn.fit leaves it; training one for each test would take minutes."""
    config = json.loads(json.dumps(CONFIG))
    config["data"]["init_args"]["length"] = length
    network = config["model"]["init_args"]["network"]["init_args"]
    network["mixer"] = {
        "class_path": f"causalrn.models.{mixer_class}",
        "init_args": {"d_model": 16, **settings},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = ["step,train/loss,train/tokens_per_second,val/copy_accuracy,val/exact_match"]
    for step in range(400):
        share = accuracy * min(1.0, step / 200)
        val = f"{share},{share}" if step % 50 == 49 else ","
        lines.append(f"{step},{3.0 / (1 + step)},{1000 + step},{val}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    metrics = {"val/copy_accuracy": accuracy, "val/exact_match": accuracy}
    results = {"step": 400, "seconds": 12.0, "metrics": metrics}
    (folder / "results.json").write_text(json.dumps(results))
    environment = {"git_revision": "1" * 40, "packages": {"torch": "2.13.0"}, "accelerators": ["NVIDIA H200"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs, as a sweep's: two models at two lengths, and an ablation."""
    folder = tmp_path / "runs"
    for model, mixer in MIXERS.items():
        for length in (8, 16):
            make_run(folder / f"model={model},length={length}", mixer, length, 1.0 if length == 8 else 0.25)
    for pre_norm in ("exact", "approx"):
        for activation in ("exp", "relu"):
            name = f"pre_norm={pre_norm},activation={activation}"
            share = 1.0 if pre_norm == "exact" and activation == "exp" else 0.5
            make_run(folder / name, "QuadraticRelation", 8, share, pre_norm=pre_norm, activation=activation)
    return folder


def test_models_are_named_by_the_mixer_and_its_convolution(tmp_path: Path) -> None:
    settings = {"d_model": 16, "activation": "relu"}
    quadratic = {"class_path": "causalrn.models.QuadraticRelation", "init_args": settings}
    # A short convolution was a mixer around the mixer once.
    make_run(tmp_path / "former", "ShortConvolution", 8, 1.0, mixer=quadratic)
    make_run(tmp_path / "plain", "QuadraticRelation", 8, 1.0)
    runs = find_runs([tmp_path])
    assert {run.name: run.model for run in runs} == {
        "former": "Quadratic CausalRN behind ShortConvolution",
        "plain": "Quadratic CausalRN",
    }
    # An ablation compares relations that read the same.
    assert views.ablation_maps(runs) == []


def test_tables_say_what_the_runs_say(runs: Path) -> None:
    found = [run for run in find_runs([runs]) if run.name.startswith("model")]
    accuracy, steps = views.copying_tables(found)
    assert accuracy.rows == ["Quadratic CausalRN", "Transformer"]
    assert accuracy.columns == ["S = 8", "S = 16"]
    assert [[cell.share for cell in row] for row in accuracy.cells] == [[1.0, 0.25], [1.0, 0.25]]
    # The row of step 199 was written after 200 steps, and there the share is 199 / 200.
    assert [[cell.text for cell in row] for row in steps.cells] == [["200", "> 399"], ["200", "> 399"]]
    (ablation,) = views.ablation_maps([run for run in find_runs([runs]) if "pre_norm" in run.name])
    assert (ablation.rows, ablation.columns) == (["exact pre-norm", "approx pre-norm"], ["exp", "relu"])
    assert [[cell.share for cell in row] for row in ablation.cells] == [[1.0, 0.5], [0.5, 0.5]]
    cost = facts.cost_table(found)
    assert cost is not None
    assert [cell.text for cell in cost.cells[0]] == ["1,200", "12"]
    configs = facts.config_table(found)
    assert configs is not None
    assert configs.columns == ["length", "class_path"] or configs.columns == ["class_path", "length"]


def test_what_is_not_whole_is_said_and_shown_as_far_as_it_goes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = make_run(runs / "torn", "LinearRelation", 8, 0.7)
    path = torn / "metrics.csv"
    path.write_text(path.read_text() + "400,0.0")
    (torn / "results.json").write_text('{"step": 4')
    (torn / "config.yaml").write_text("{data: [")
    bare = runs / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (runs / "garbage").mkdir()
    (runs / "garbage" / "metrics.csv").write_text("step,train/loss\n1,0.5\nhello,world\n")
    report.main([str(runs), "--output", str(tmp_path / "report.html")])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    for wanted in (
        "torn: metrics.csv has a torn last line, which is left out",
        "torn: results.json is half-written",
        "torn: config.yaml is half-written",
        "torn: unfinished: last logged at step 399",
        "bare: metrics.csv is missing",
        "bare: environment.json is missing",
        "garbage: metrics.csv cannot be read",
    ):
        assert any(wanted in note for note in notes), wanted
    assert "torn last line" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["nowhere"], "no run folder nowhere"),
        (["empty"], "empty holds no runs"),
        (["runs", "--metrics", "val/los"], "no run has the metric val/los: want one of val/copy_accuracy"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(
    args: list[str],
    wanted: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert wanted in error_of(report.main, args, capsys)
    assert not Path("report.html").exists()


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


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium, as Debian's packages chromium and chromium-driver bring it."""
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.mark.slow
def test_the_page_in_a_browser(browser: Any, runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report.main([str(runs), "--output", str(page), "--title", "Copying & <more>"])
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    browser.get(page.as_uri())
    assert browser.title == "Copying & <more>"
    script = browser.execute_script
    # Nothing but the page itself was asked for.
    assert script("return performance.getEntriesByType('resource').length") == 0
    sections = script("return [...document.querySelectorAll('section')].map(s => s.id)")
    assert sections == ["copying", "ablation", "curves", "cost", "runs", "configs", "machines"]
    # A chart for each of four metrics.
    assert script("return document.querySelectorAll('#curves svg').length") == 4
    assert "model=transformer,length=8" in browser.find_element("id", "curves").text
    assert "NVIDIA H200" in browser.find_element("id", "machines").text
    # On a phone the page itself never scrolls sideways; wide tables do, inside their frames.
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert script("return document.documentElement.scrollWidth") <= 360
    assert (
        script(
            "return Math.max(...[...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().right))"
        )
        <= 360
    )
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors
