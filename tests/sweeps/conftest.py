"""Sweep files for the tests."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_fit import CONFIG


@pytest.fixture
def write(tmp_path: Path):
    """Writes a sweep file beside the config of a tiny run."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG))

    def write_sweep(content: dict[str, Any] | str) -> Path:
        path = tmp_path / "grid.yaml"
        if isinstance(content, dict):
            content = yaml.safe_dump(
                sort_keys=False, data={"configs": ["base.yaml"], "output": str(tmp_path / "out")} | content
            )
        path.write_text(content)
        return path

    return write_sweep
