"""Free memory is read from the system and from the container's limit, whichever is lower."""

from pathlib import Path

import pytest
import torch

from causalrn import system


def test_a_container_may_allow_less_than_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(system, "CGROUP", tmp_path)
    unlimited = system.available_bytes(cpu)
    assert unlimited is not None
    assert 2**20 < unlimited < 2**60
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert system.available_bytes(cpu) == 4_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert system.cgroup_bytes() is None


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")]
)
def test_bytes_carry_a_unit(count: float, text: str) -> None:
    assert system.format_bytes(count) == text
