"""The measured limit: what the bare loops count."""

import pytest
import torch

from causalrn.ops import exp_probe, native


@pytest.mark.parametrize("compiled", [True, False])
def test_rate_is_plausible(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "load_library", lambda: None)
    # One core evaluates no fewer than ten million and no more than a trillion per second.
    assert 1e7 < exp_probe.measure_exp_rate(measurements=3) < 1e12 * torch.get_num_threads()
