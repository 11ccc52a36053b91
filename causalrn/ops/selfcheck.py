"""Checks every operator on the devices of this machine against its definition in float64.

    python -m causalrn.ops.selfcheck

One line per check; exit code 1 if any value or gradient is further off than rounding explains. Run it once on a new
kind of GPU or a new version of Triton, before trusting a training run to it.
"""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from causalrn.ops import (
    PairRule,
    PairTerms,
    normalise,
    relation_linear,
    relation_linear_step,
    relation_quadratic,
    relation_quadratic_step,
    stored_linear,
)
from causalrn.ops import reference as definitions
from causalrn.ops.linear.operator import relation_linear_total
from causalrn.ops.reference import LinearState, relation_linear_reference, relation_quadratic_reference

# Largest error relative to the largest element. Float32: sums, statistics and exponents of up to 10 in float32.
# bfloat16: a rounding of the result to 8 digits, and one more on the way where a kernel stores a row between.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
EPS = 1e-3


class Check(NamedTuple):
    """An operator and its definition, both functions of the same tensors.

    Attributes:
        name: what is checked.
        operator: gives the values to compare.
        definition: gives them from float64 tensors.
        inputs: float32 tensors, of which copies in the tested dtype are taken (and differentiated).
        is_differentiable: whether to compare gradients, too.
    """

    name: str
    operator: Callable[..., tuple[Tensor, ...]]
    definition: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    is_differentiable: bool = True


def quadratic_checks() -> Iterator[Check]:
    sizes = ((70, 70, 1, 192), (3, 40, 2, 33), (20, 20, 1, 768))
    for n_queries, n_keys, heads, channels in sizes:
        q, k = 2 * torch.randn(1, n_queries, heads, channels), torch.randn(1, n_keys, heads, channels) - 1
        for settings in ({}, {"norm": "rms", "causal": False}, {"norm": "none"}, {"activation": "gelu"}):
            # Without a norm, only small inputs keep exponentials of sums in range.
            inputs = (q / 4, k / 4) if settings.get("norm") == "none" else (q, k)
            yield quadratic_check(f"{n_queries} of {n_keys} x {heads} x {channels}", inputs, settings)
    gain = torch.rand(17, 2) + 0.5
    inputs = torch.randn(2, 17, 2, 24), torch.randn(2, 17, 2, 24), gain
    options = {"window": torch.tensor([3, 9]), "slope": torch.tensor([0.1, 0.3])}
    for activation in ("exp", "relu", "elu", "gelu"):
        yield quadratic_check("gain, window, slope", inputs, {"activation": activation, **options})


def quadratic_check(name: str, inputs: tuple[Tensor, ...], settings: dict) -> Check:
    def run(function: Callable, q: Tensor, k: Tensor, gain: Tensor | None = None) -> tuple[Tensor]:
        moved = {key: x.to(q.device) if isinstance(x, Tensor) else x for key, x in settings.items()}
        return (function(q, k, eps=EPS, gain=gain, **moved),)

    words = [name, *(str(x) for x in settings.values() if not isinstance(x, Tensor | bool))]
    return Check(
        f"relation_quadratic ({', '.join(words)})",
        lambda *tensors: run(relation_quadratic, *tensors),
        lambda *tensors: run(relation_quadratic_reference, *tensors),
        inputs,
    )


def linear_checks() -> Iterator[Check]:
    for length, heads, channels in ((70, 1, 192), (40, 3, 33), (20, 1, 768), (5, 1, 3072)):
        q, k = torch.randn(2, 2, length, heads, channels)
        total = 5 * torch.rand(2, heads, channels)
        for causal, norm in ((True, "layer"), (False, "rms")):

            def run(
                function: Callable, q: Tensor, k: Tensor, total: Tensor, causal: bool = causal, norm: str = norm
            ) -> tuple[Tensor, Tensor]:  # fmt: skip
                state = LinearState(total, torch.zeros(len(q), device=q.device))
                y, state = function(q, k, state, eps=EPS, causal=causal, norm=norm)
                return y, state.total

            yield Check(
                f"relation_linear ({length} x {heads} x {channels}, {norm}{'' if causal else ', bidirectional'})",
                lambda *tensors, run=run: run(relation_linear, *tensors),
                lambda *tensors, run=run: run(relation_linear_reference, *tensors),
                (2 * q, k + 1, total),
            )
    q, k = torch.randn(2, 2, 3, 32)
    yield Check("relation_linear_step", take_step, take_step_by_definition, (q, k, torch.rand(2, 3, 32)))
    yield Check(
        "relation_linear_total",
        lambda k: (relation_linear_total(k, eps=EPS),),
        lambda k: (definitions.normalise(k, "layer", EPS).exp().sum(1),),
        (torch.randn(2, 300, 1, 48),),
    )


def take_step(q: Tensor, k: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    y, state = relation_linear_step(q, k, LinearState(total, torch.ones(len(q), device=q.device)), eps=EPS)
    return y, state.total


def take_step_by_definition(q: Tensor, k: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    state = LinearState(total, torch.ones(len(q), device=q.device))
    y, state = relation_linear_reference(q[:, None], k[:, None], state, eps=EPS)
    return y[:, 0], state.total


def check_normalise(norm: definitions.Norm) -> Check:
    return Check(
        f"normalise ({norm})",
        lambda x: (normalise(x, norm, EPS),),
        lambda x: (definitions.normalise(x, norm, EPS),),
        (3 * torch.randn(4, 9, 100) + 1,),
    )


def other_checks() -> Iterator[Check]:
    yield check_normalise("layer")
    yield check_normalise("rms")
    for channels in (48, 192):
        yield Check(
            f"relation_quadratic_step ({channels})",
            lambda q, cache: relation_quadratic_step(
                q, cache, torch.full(q.shape[:1], 50, device=q.device), PairTerms(), PairRule(EPS)
            )[:1],
            lambda q, cache: (relation_quadratic_reference(q[:, None], cache[:, :50], eps=EPS)[:, 0],),
            (torch.randn(3, 2, channels), torch.randn(3, 64, 2, channels)),
            is_differentiable=False,
        )
    yield Check(
        "stored_linear",
        lambda x, weight: (stored_linear(x, weight),),
        lambda x, weight: (F.linear(x, weight),),
        (torch.randn(3, 64), torch.randn(50, 64)),
        is_differentiable=False,
    )


def results(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...] | None,
) -> tuple[Tensor, ...]:
    """Values, and the gradients of their sum with these weights where there are any, on the CPU."""
    if weights is None:
        with torch.no_grad():
            return tuple(x.double().cpu() for x in function(*inputs))
    leaves = [x.clone().requires_grad_() for x in inputs]
    values = function(*leaves)
    outward = [weight.to(value) for weight, value in zip(weights, values, strict=True)]
    gradients = torch.autograd.grad(values, leaves, outward)
    return tuple(x.detach().double().cpu() for x in (*values, *gradients))


def error_of(check: Check, device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of all values and gradients, each relative to its largest element; NaN if any is."""
    inputs = tuple(x.to(device, dtype) for x in check.inputs)
    exact = tuple(x.double().cpu() for x in inputs)
    weights = None
    if check.is_differentiable:
        # The tested dtype holds these numbers exactly.
        weights = tuple(torch.randn(x.shape).to(dtype) for x in check.definition(*exact))
    pairs = zip(
        results(check.operator, inputs, weights), results(check.definition, exact, weights), strict=True
    )
    return torch.stack([(x - wanted).abs().max() / wanted.abs().max() for x, wanted in pairs]).max().item()


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    return found + [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def main() -> int:
    failures = 0
    for device in devices():
        for dtype, limit in LIMITS.items():
            torch.manual_seed(0)
            for check in (*quadratic_checks(), *linear_checks(), *other_checks()):
                label = f"{device} {str(dtype).removeprefix('torch.')} {check.name}"
                try:
                    error = error_of(check, device, dtype)
                    # NaN compares as a failure.
                    passed, outcome = error <= limit, f"error {error:.1e}, limit {limit:.1e}"
                # A kernel that does not compile or launch here is a finding like any other.
                except Exception as failure:  # noqa: BLE001
                    passed, outcome = (
                        False,
                        f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}",
                    )
                failures += not passed
                print(f"{'ok  ' if passed else 'FAIL'} {label}: {outcome}", flush=True)
    print(f"{failures} checks failed" if failures else "all checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
