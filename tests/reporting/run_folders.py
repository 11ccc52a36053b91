"""Run folders as causalrn.fit leaves them; training one for each test would take minutes."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.test_fit import CONFIG

MIXERS = {"quadratic": "QuadraticRelation", "transformer": "SoftmaxAttention"}


def make_run(folder: Path, mixer_class: str, length: int, accuracy: float, **settings: Any) -> Path:
    """A run of 400 steps that reaches an accuracy half-way."""
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
