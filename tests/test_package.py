"""The wheel and the sdist hold what they must, and the wheel works in a clean environment."""

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT

SMOKE = """
import torch
from causalrn.models import LanguageModel, LinearRelation, QuadraticRelation
for mixer in (QuadraticRelation(16, 16), LinearRelation(16, 16)):
    model = LanguageModel(mixer, vocab_size=29, n_layers=2, max_length=18)
    logits = model(torch.zeros(2, 18, dtype=torch.int64))
    logits.sum().backward()
    assert logits.shape == (2, 18, 29), logits.shape
import causalrn, datamodules.text
print(causalrn.__file__)
"""

# pip would take a checkout that PYTHONPATH names for an installed package.
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
# The first test compiles the kernels, the second one installs torch.
pytestmark = pytest.mark.timeout(3000)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    output = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=1200,
    )
    (wheel,), (sdist,) = output.glob("*.whl"), output.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.fixture(scope="module")
def python(distributions: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment in which the wheel is installed."""
    environment = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=300)
    pip = [str(environment / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    # Bytecode of what is never imported here takes most of an installation's time.
    pip += ["--no-compile"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    # torch first and pinned, or the wheel's requirement takes the newest CUDA build.
    for requirement in (["torch==2.13.0", "numpy"], [str(distributions["wheel"])]):
        subprocess.run(
            [*pip, *constraints, *requirement], check=True, timeout=1200, capture_output=True, env=CLEAN
        )
    return environment / "bin" / "python"


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the clean environment's Python in an empty folder."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), "-W", "ignore", *arguments],
            cwd=tmp_path,
            env=CLEAN,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return call


def files_in(folder: str) -> list[str]:
    paths = (ROOT / folder).rglob("*")
    return [path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and path.suffix != ".pyc"]


@pytest.mark.slow
def test_distributions_hold_code_configs_corpus_and_licence(distributions: dict[str, Path]) -> None:
    wheel = zipfile.ZipFile(distributions["wheel"]).namelist()
    with tarfile.open(distributions["sdist"]) as archive:
        sdist = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    for name in ("causalrn/fit.py", "causalrn/py.typed", "datamodules/text.py"):
        assert name in wheel
        assert name in sdist
    assert any(name.startswith("datamodules/corpora/state_of_the_union") for name in wheel)
    assert any(name.endswith("LICENSE") for name in wheel)
    assert any(name.startswith("causalrn/ops/csrc/") and name.endswith(".cpp") for name in sdist)
    assert any(name.startswith("causalrn/ops/csrc/") and name.endswith(".h") for name in sdist)
    # Other names at the top belong to others: to the checkout's tools, or to another project.
    assert {name.split("/")[0].partition("-")[0] for name in wheel} == {"causalrn", "datamodules"}
    assert {name for name in wheel if name.startswith("causalrn/configs/")} == {
        f"causalrn/{name}" for name in files_in("configs")
    }
    # The wheel was built from the sdist, which can be worked in like a checkout.
    for folder in ("configs", "launch", "tests", "docs", "benchmarks"):
        assert set(files_in(folder)) <= set(sdist), folder
    assert {"constraints.txt", "Makefile", "CHANGELOG.md", "CITATION.cff", "setup.py"} <= set(sdist)


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(run: Callable[..., Any], python: Path) -> None:
    done = run("-c", SMOKE)
    assert done.returncode == 0, done.stderr
    assert str(python.parents[1]) in done.stdout


@pytest.mark.slow
def test_wheel_trains_and_evaluates_from_an_empty_folder(run: Callable[..., Any], tmp_path: Path) -> None:
    steps = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
    overlay = ["--config", "mixer/transformer.yaml", "--run_dir", "run"]
    for arguments in (
        ["causalrn.fit", "--config", "copy/quickstart.yaml", *overlay, *steps],
        ["causalrn", "generate", "--checkpoint", "run", "--prompt", "abc", "--max-tokens", "2"],
        ["causalrn.sweep", "--config", "sweeps/copying_small.yaml", "--slurm"],
    ):
        done = run("-m", *arguments)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    mixer = resolved["model"]["init_args"]["network"]["init_args"]["mixer"]["class_path"]
    assert mixer == "causalrn.models.SoftmaxAttention"
    assert (tmp_path / "runs/sweeps/copying_small/.sweep/array.sbatch").exists()


@pytest.mark.slow
def test_wheel_says_what_it_lacks(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("-m", "causalrn.fit", "--config", "copy/quickstrat.yaml")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: config copy/quickstrat.yaml: no such file in {tmp_path}/copy or ")
    assert "/causalrn/configs/copy; did you mean copy/quickstart.yaml" in line
    # These are tools of a checkout.
    for module in ("launch", "benchmarks"):
        assert run("-m", module).stderr.strip().endswith(f"No module named {module}")
