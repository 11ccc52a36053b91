"""The wheel and the sdist hold what they must, and the wheel works in a clean environment."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    output = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,), (sdist,) = output.glob("*.whl"), output.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.slow
def test_distributions_hold_code_corpus_and_licence(distributions: dict[str, Path]) -> None:
    wheel = zipfile.ZipFile(distributions["wheel"]).namelist()
    with tarfile.open(distributions["sdist"]) as archive:
        sdist = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    for name in ("causalrn/fit.py", "causalrn/py.typed", "datamodules/text.py", "launch/fit.sbatch"):
        assert name in wheel
        assert name in sdist
    assert any(name.startswith("datamodules/corpora/state_of_the_union") for name in wheel)
    assert any(name.endswith("LICENSE") for name in wheel)
    assert any(name.startswith("causalrn/ops/csrc/") and name.endswith(".cpp") for name in sdist)
    assert any(name.startswith("causalrn/ops/csrc/") and name.endswith(".h") for name in sdist)
    assert not any(name.startswith("tests/") for name in wheel)


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(distributions: dict[str, Path], tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, timeout=300)
    pip = [str(environment / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    # torch first and pinned, or the wheel's requirement takes the newest CUDA build.
    for requirement in (["torch==2.13.0", "numpy"], [str(distributions["wheel"])]):
        subprocess.run([*pip, *constraints, *requirement], check=True, timeout=540, capture_output=True)
    done = subprocess.run(
        [str(environment / "bin" / "python"), "-W", "ignore", "-c", SMOKE],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert str(environment) in done.stdout
