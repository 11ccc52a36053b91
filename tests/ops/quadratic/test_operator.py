"""The quadratic relation as a PyTorch operator: registration, gradcheck, torch.compile, autocast, memory, mistakes."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from causalrn.ops import native, relation_quadratic, relation_quadratic_shifted
from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.ops.quadratic import cpu

OPERATORS = torch.ops.causalrn


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optional", [True, False])
def test_registration(dtype: torch.dtype, optional: bool) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    grad, q = torch.randn(2, 2, 5, 2, 4).to(dtype)
    k = torch.randn(2, 7, 2, 4).to(dtype).requires_grad_()
    settings: list[Any] = [None, None, None]
    if optional:
        settings = [
            torch.rand(5, 2, dtype=wide),
            torch.tensor([2, 9], dtype=torch.int32),
            torch.rand(2, dtype=wide),
        ]
    rest = (1e-3, True, "layer", "exp")
    gain = settings[0].clone().requires_grad_() if optional else None
    for shifted in (False, True):
        inputs = (q.clone().requires_grad_(), k, gain, *settings[1:], *rest, shifted)
        torch.library.opcheck(OPERATORS.relation_quadratic, inputs)
    torch.library.opcheck(
        OPERATORS.relation_quadratic_backward, (grad, q, k.detach(), *settings, *rest, None)
    )


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["exp", "gelu", "elu"])
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_gradcheck(norm: Any, activation: Any) -> None:
    q, k = (torch.randn(2, length, 2, 3, dtype=torch.float64, requires_grad=True) for length in (5, 7))
    gain = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    window, slope = torch.tensor([3, 100]), torch.tensor([0.0, 0.2])

    def function(q: Tensor, k: Tensor, gain: Tensor) -> Tensor:
        rule = PairRule(0.2, norm=norm, activation=activation)
        return relation_quadratic(q, k, PairTerms(gain, window, slope), rule)

    assert torch.autograd.gradcheck(function, (q, k, gain))


def test_second_derivative_is_refused() -> None:
    q = torch.randn(1, 4, 1, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(
        relation_quadratic(q, q, PairTerms(), PairRule(1e-3)).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_compiles_into_one_graph() -> None:
    def function(q: Tensor, k: Tensor, gain: Tensor) -> Tensor:
        return relation_quadratic(q * 2, k, PairTerms(gain), PairRule(1e-4)).sin() + 1

    inputs = [
        torch.randn(2, 33, 2, 8, requires_grad=True),
        torch.randn(2, 40, 2, 8, requires_grad=True),
        torch.rand(33, 2, requires_grad=True),
    ]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    values = [f(*inputs) for f in (compiled, function)]
    gradients = [torch.autograd.grad(value.square().sum(), inputs) for value in values]
    for actual, wanted in zip((values[0], *gradients[0]), (values[1], *gradients[1]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-6)


def test_autocast_and_mixed_dtypes() -> None:
    projection = nn.Linear(12, 16)
    x = torch.randn(2, 30, 12)
    with torch.autocast("cpu", torch.bfloat16):
        q = projection(x).view(2, 30, 2, 8)
        out = relation_quadratic(q, q, PairTerms(), PairRule(1e-5))
        mixed = relation_quadratic(q, q.float(), PairTerms(), PairRule(1e-5))
    assert (out.dtype, mixed.dtype) == (torch.bfloat16, torch.float32)
    # The same sums in float32: only the storage of the result differs.
    torch.testing.assert_close(out, mixed.bfloat16(), rtol=0, atol=0)
    (out.float() * mixed).sum().backward()
    assert projection.weight.grad is not None


def test_only_the_inputs_are_kept_for_backward() -> None:
    kept: list[Tensor] = []
    q, k = torch.randn(2, 1, 64, 1, 16, requires_grad=True)
    gain = torch.ones(64, 1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        relation_quadratic(q, k, PairTerms(gain), PairRule(1e-5))
    assert sum(x.numel() for x in kept) == q.numel() + k.numel() + gain.numel()


MEASURE_PEAK = """
import sys, torch
from benchmarks.common import status_bytes
from causalrn.ops import PairRule, PairTerms, native, relation_quadratic
if sys.argv[1] == "eager":
    native.serves = lambda x: False
length, channels = int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(2)
def step(length):
    q, k = (torch.randn(1, length, 1, channels, requires_grad=True) for _ in range(2))
    # Not ru_maxrss, which a process inherits from the one that started it.
    before = status_bytes("VmHWM")
    relation_quadratic(q, k, PairTerms(), PairRule(1e-5)).sum().backward()
    return status_bytes("VmHWM") - before
step(8)
print(step(length))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("path", "length", "channels"), [("native", 8192, 192), ("eager", 1024, 64)])
def test_peak_memory(path: str, length: int, channels: int) -> None:
    """300 MB above the inputs hold T 8192, D 192 with its gradients (25 MB); the plain formula needs 50 GB."""
    if path == "native" and not native.supported_instruction_sets():
        pytest.skip("no compiled kernels here")
    command = [sys.executable, "-c", MEASURE_PEAK, path, str(length), str(channels)]
    peak_bytes = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0 < peak_bytes < 300e6


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 8)}, "got q (2, 4, 8)"),
        ({"q": torch.zeros(2, 6, 1, 8)}, "at most as many queries as keys"),
        ({"k": torch.zeros(2, 4, 2, 8)}, "and k (2, 4, 2, 8), wanted (B, Tq, H, D)"),
        ({"norm": "batch"}, "got norm 'batch', wanted one of ('layer', 'rms', 'none')"),
        ({"activation": "tanh"}, "got activation 'tanh'"),
        ({"eps": -1.0}, "got eps -1.0"),
        ({"gain": torch.ones(4)}, "got gain (4,), wanted (4, 1)"),
        ({"window": torch.ones(2)}, "got window (2,), wanted (1,)"),
        ({"slope": torch.ones(1, requires_grad=True)}, "got a slope that requires a gradient"),
        ({"eps": float("nan")}, "got eps nan"),
        ({"window": torch.tensor([0])}, "got window [0], wanted 1 or more positions"),
        ({"window": torch.tensor([-3])}, "got window [-3]"),
        ({"slope": torch.tensor([-0.5])}, "got slope [-0.5], wanted numbers >= 0"),
        ({"slope": torch.tensor([float("nan")])}, "got slope [nan]"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    tensors = {"q": torch.zeros(2, 4, 1, 8), "k": torch.zeros(2, 4, 1, 8)}
    arguments: dict[str, Any] = {**tensors, "eps": 1e-5, "gain": torch.ones(4, 1), **change}
    terms = PairTerms(**{name: arguments.pop(name, None) for name in PairTerms._fields})
    q, k = arguments.pop("q"), arguments.pop("k")
    for function in (relation_quadratic, relation_quadratic_shifted):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            function(q, k, terms, PairRule(**arguments))
        assert message in str(caught.value)


def test_no_memory_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.supported_instruction_sets():
        pytest.skip("no compiled kernels here")
    # Two pebibytes of scratch: no system grants them.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    q = torch.zeros(1, 1, 1, 8).expand(1, 2**40, 1, 8)
    with pytest.raises(MemoryError, match="no memory left"):
        cpu.call("quadratic_forward", q[:, :1], q, PairTerms(), PairRule(1e-5))
