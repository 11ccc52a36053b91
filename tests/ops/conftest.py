"""Fixtures of the operators' tests."""

import pytest

from tests.ops.paths import PATHS, use_path


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> str:
    """Each path of the CPU in turn; memory that stays unwritten holds NaN."""
    use_path(request.param, monkeypatch)
    return request.param
