"""The Triton kernel of the quadratic relation's step equals its definition, and compiles ahead of time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from causalrn.ops.pairs import PairTerms
from tests.ops.quadratic.test_step import SETTINGS, expected, terms_and_rule
from tests.ops.test_triton_aot import ARCHITECTURES, assert_compile, record_launches
from tests.ops.triton_device import (
    DEVICE,
    HAS_TRITON,
    INTERPRETED,
    assert_passes_interpreted,
    needs_device,
    relative_error,
    starts_interpreter,
)


@starts_interpreter
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


def run(q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor, **settings: Any) -> torch.Tensor:
    from causalrn.ops.quadratic import step_gpu as quadratic_step_triton

    terms, rule = terms_and_rule(q, **settings)
    terms = PairTerms(*(None if x is None else x.to(q.device) for x in terms))
    return quadratic_step_triton.step(q, cache, lengths, terms, rule)


# A steep slope overflows behind a row's length, which only the interpreter notices; nothing of it is kept.
@needs_device
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_the_definition(settings: dict[str, Any], poisoned_empty: None) -> None:
    q, cache, lengths = torch.randn(3, 2, 40), torch.randn(3, 150, 2, 40), torch.tensor([1, 64, 150])
    want = expected(q, cache, lengths, **settings)
    # What lies beyond a row's length must not be looked at.
    cache[0, 1:], cache[1, 64:] = float("nan"), float("nan")
    out = run(q.to(DEVICE), cache.to(DEVICE), lengths.to(DEVICE), **settings).cpu()
    assert relative_error(out, want) < 5e-6


@needs_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 130, 700])
def test_caches_as_decoding_keeps_them(dtype: torch.dtype, channels: int) -> None:
    # Heads first in memory, with room for more positions.
    buffer = torch.randn(2, 2, 90, channels).to(dtype)
    cache, lengths = buffer[:, :, :70].transpose(1, 2), torch.tensor([70, 65])
    q = torch.randn(2, 2, channels)
    settings = {"norm": "none", "activation": "gelu"} if channels == 1 else {}
    out = run(q.to(DEVICE), cache.to(DEVICE), lengths.to(DEVICE), **settings).cpu()
    assert relative_error(out, expected(q, cache, lengths, **settings)) < 5e-6


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize(
    ("channels", "dtype"), [(64, torch.float32), (3072, torch.bfloat16), (8192, torch.float32)]
)
def test_compiles_ahead_of_time(
    channels: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    q, cache = torch.randn(2, 2, channels), torch.randn(2, 70, 2, channels).to(dtype)
    lengths = torch.tensor([70, 33])
    launches = record_launches(
        monkeypatch, lambda: run(q, cache, lengths, window=[5, 70], slope=[0.1, 0.0], gain=2.0)
    )
    assert_compile(launches, ARCHITECTURES, tmp_path)
