"""The page in a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from causalrn import report


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
