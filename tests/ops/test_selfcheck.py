"""The check of a user's machine passes here, and finds an operator that is wrong or does not run."""

import pytest
import torch
from torch import Tensor

from causalrn.ops import selfcheck


@pytest.mark.slow
def test_every_operator_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.main() == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "all checks passed"
    names = {line.split()[3].rstrip(":") for line in lines if line.startswith("ok   cpu float32 ")}
    assert names == {
        *("normalise", "relation_linear", "relation_linear_step", "relation_linear_total"),
        *("relation_quadratic", "relation_quadratic_step", "stored_linear"),
    }


@pytest.mark.parametrize("broken", ["wrong", "failing"])
def test_a_broken_operator_is_named(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: Tensor, weight: Tensor) -> Tensor:
        if broken == "failing":
            raise RuntimeError("no such instruction")
        return 1.1 * torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(selfcheck, "stored_linear", wrong)
    for name in ("quadratic_checks", "linear_checks"):
        monkeypatch.setattr(selfcheck, name, list)
    assert selfcheck.main() == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == 2
    assert all("stored_linear" in line for line in failed)
    assert all("no such instruction" in line for line in failed) == (broken == "failing")
    assert lines[-1] == "2 checks failed"
