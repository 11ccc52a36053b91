"""The decoding step of the quadratic relation equals the definition's last row, on every path and for every setting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from causalrn.ops import native
from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.ops.quadratic import cpu, eager
from causalrn.ops.quadratic.step import relation_quadratic_step
from causalrn.ops.reference import relation_quadratic_reference
from tests.ops.quadratic.settings import terms_and_rule as split

SETTINGS: list[dict[str, Any]] = [
    {},
    {"norm": "rms"},
    {"norm": "none", "activation": "relu"},
    {"activation": "elu"},
    {"activation": "gelu"},
    {"gain": 1.4},
    {"window": [5, 1000]},
    {"slope": [0.3, 0.0]},
    # So steep that what lies behind a row's length would weigh more than floats hold.
    {"slope": [60.0, 0.1]},
    {"gain": 2.5, "window": [70, 3], "slope": [0.01, 0.5]},
]


def step(q: Tensor, cache: Tensor, lengths: Tensor, **settings: Any) -> Tensor:
    out, shift = relation_quadratic_step(q, cache, lengths, *terms_and_rule(q, **settings))
    # No row of these tests leaves the range.
    assert shift is None or not shift.any()
    return out


def eager_step(q: Tensor, cache: Tensor, lengths: Tensor, **settings: Any) -> Tensor:
    return eager.step(q, cache, lengths, *terms_and_rule(q, **settings))


def terms_and_rule(q: Tensor, **settings: Any) -> tuple[PairTerms, PairRule]:
    return split(eps=1e-5, **tensors(settings, q))


def tensors(settings: dict[str, Any], q: Tensor) -> dict[str, Any]:
    out = dict(settings)
    if "gain" in out:
        out["gain"] = torch.full(q.shape[:2], out["gain"])
    for name, dtype in (("window", torch.int32), ("slope", torch.float32)):
        if name in out:
            out[name] = torch.tensor(out[name], dtype=dtype)
    return out


def expected(q: Tensor, cache: Tensor, lengths: Tensor, **settings: Any) -> Tensor:
    """Row by row by the definition in float64."""
    rows = []
    for b, length in enumerate(lengths.tolist()):
        options = tensors(settings, q)
        if "gain" in options:
            options["gain"] = options["gain"][b][None].double()
        row = relation_quadratic_reference(
            q[b][None, None].double(), cache[b][None, :length].double(), *split(eps=1e-5, **options)
        )
        rows.append(row[0, 0])
    return torch.stack(rows)


@pytest.fixture(params=["operator", "eager"])
def implementation(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return {"operator": step, "eager": eager_step}[request.param]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("channels", [7, 48, 100])
def test_equals_the_definition(
    implementation: Callable[..., Tensor], settings: dict[str, Any], channels: int, poisoned_empty: None
) -> None:
    q, cache = torch.randn(3, 2, channels), torch.randn(3, 150, 2, channels)
    lengths = torch.tensor([1, 64, 150])
    # What lies beyond a row's length must not be looked at.
    cache[0, 1:], cache[1, 64:] = float("nan"), float("nan")
    out = implementation(q, cache, lengths, **settings)
    want = expected(q, cache, lengths, **settings)
    assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("isa", native.supported_instruction_sets())
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    q, cache = torch.randn(2, 1, 203), torch.randn(2, 65, 1, 203)
    lengths = torch.tensor([65, 30])
    assert_close(step(q, cache, lengths).double(), expected(q, cache, lengths), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cache_of_another_dtype(implementation: Callable[..., Tensor], dtype: torch.dtype) -> None:
    q, cache = torch.randn(2, 2, 40), torch.randn(2, 90, 2, 40).to(dtype)
    lengths = torch.tensor([90, 33])
    out = implementation(q, cache, lengths)
    assert out.dtype is torch.float32
    assert_close(out.double(), expected(q, cache, lengths), atol=1e-5, rtol=1e-5)


def test_retrieval_keeps_its_digits(implementation: Callable[..., Tensor]) -> None:
    # Where q is close to -k_j, an expanded |q + k|^2 would have lost every digit.
    cache = 10 * torch.randn(1, 80, 1, 64)
    q = -cache[:, 40] + 1e-3 * torch.randn(1, 1, 64)
    lengths = torch.tensor([80])
    # The inputs themselves resolve q + k to 1e-3, relative to which float32 leaves 10 * 6e-8 / 1e-3.
    assert_close(
        implementation(q, cache, lengths).double(), expected(q, cache, lengths), atol=1e-4, rtol=1e-4
    )


def test_reads_a_growing_cache_in_place() -> None:
    # Heads first in memory and with room for more positions, as decoding keeps it.
    buffer = torch.randn(2, 3, 64, 32)
    q, lengths = torch.randn(2, 3, 32), torch.tensor([20, 7])
    view = buffer[:, :, :20].transpose(1, 2)
    assert cpu.serves_step(q, view) or not native.supported_instruction_sets()
    assert torch.equal(step(q, view, lengths), step(q, view.contiguous(), lengths))


def test_result_does_not_depend_on_the_threads() -> None:
    q, cache, lengths = torch.randn(1, 1, 512), torch.randn(1, 700, 1, 512), torch.tensor([700])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(step(q, cache, lengths))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("shapes", "length", "message"),
    [
        (((2, 1, 8), (2, 5, 1, 9)), 3, r"q \(2, 1, 8\)"),
        (((2, 1, 8), (2, 5, 1, 8)), 6, "lengths 6 to 6, wanted 1 to 5"),
        (((2, 1, 8), (2, 5, 1, 8)), 0, "lengths 0 to 0"),
    ],
)
def test_wrong_arguments_are_named(shapes: tuple, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step(torch.zeros(shapes[0]), torch.zeros(shapes[1]), torch.tensor([length, length]))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": torch.tensor([0])}, r"got window \[0\], wanted 1 or more positions"),
        ({"window": torch.tensor([3, 3])}, r"got window \(2,\), wanted \(1,\)"),
        ({"slope": torch.tensor([-1.0])}, r"got slope \[-1.0\], wanted numbers >= 0"),
        ({"gain": torch.ones(2)}, r"got gain \(2,\), wanted \(2, 1\)"),
        ({"eps": -1.0}, "got eps -1.0"),
        ({"norm": "batch"}, "got norm 'batch'"),
        ({"activation": "tanh"}, "got activation 'tanh'"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"eps": 1e-5, "gain": torch.ones(2, 1), **change}
    terms, rule = split(**arguments)
    with pytest.raises(ValueError, match=message):
        relation_quadratic_step(
            torch.zeros(2, 1, 8), torch.zeros(2, 5, 1, 8), torch.tensor([5, 2]), terms, rule
        )


def test_windows_and_gains_in_any_dtype() -> None:
    """The kernel reads 32 bits each."""
    q, cache, lengths = torch.randn(2, 2, 8), torch.randn(2, 30, 2, 8), torch.tensor([30, 12])
    gain, window, slope = torch.rand(2, 2), torch.tensor([5, 9]), torch.tensor([0.1, 0.2])
    wide = PairTerms(gain.double(), window, slope.double())
    narrow = PairTerms(gain, window.to(torch.int32), slope)
    results = [relation_quadratic_step(q, cache, lengths, x, PairRule(1e-5))[0] for x in (wide, narrow)]
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_a_steep_slope_on_a_row_shorter_than_the_cache() -> None:
    # float64 has no compiled kernel.
    q, cache = (torch.randn(*shape, dtype=torch.float64) for shape in ((1, 1, 4), (1, 2000, 1, 4)))
    lengths, terms = torch.tensor([3]), PairTerms(slope=torch.tensor([1.0], dtype=torch.float64))
    out, _ = relation_quadratic_step(q, cache, lengths, terms, PairRule(1e-5))
    assert torch.equal(out, relation_quadratic_step(q, cache[:, :3], lengths, terms, PairRule(1e-5))[0])
