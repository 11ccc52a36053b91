"""Checks every operator on the devices of this machine against its definition in float64.

    python -m causalrn.ops.selfcheck

One line per check; exit code 1 if any value or gradient is further off than rounding explains. Run it once on a new
kind of GPU or a new version of Triton, before trusting a training run to it.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, get_args

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
from causalrn.ops.pairs import Activation
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
    rules = (
        PairRule(EPS),
        PairRule(EPS, False, "rms"),
        PairRule(EPS, norm="none"),
        PairRule(EPS, activation="gelu"),
    )
    for n_queries, n_keys, heads, channels in ((70, 70, 1, 192), (3, 40, 2, 33), (20, 20, 1, 768)):
        q, k = 2 * torch.randn(1, n_queries, heads, channels), torch.randn(1, n_keys, heads, channels) - 1
        for rule in rules:
            # Without a norm, only small inputs keep exponentials of sums in range.
            inputs = (q / 4, k / 4) if rule.norm == "none" else (q, k)
            yield quadratic_check(
                f"{n_queries} of {n_keys} x {heads} x {channels}", inputs, PairTerms(), rule
            )
    inputs = torch.randn(2, 17, 2, 24), torch.randn(2, 17, 2, 24), torch.rand(17, 2) + 0.5
    terms = PairTerms(window=torch.tensor([3, 9]), slope=torch.tensor([0.1, 0.3]))
    for activation in get_args(Activation):
        rule = PairRule(EPS, activation=activation)
        yield quadratic_check("gain, window, slope", inputs, terms, rule)


def quadratic_check(name: str, inputs: tuple[Tensor, ...], terms: PairTerms, rule: PairRule) -> Check:
    def run(
        function: Callable[..., Tensor], q: Tensor, k: Tensor, gain: Tensor | None = None
    ) -> tuple[Tensor]:
        _, window, slope = (x if x is None else x.to(q.device) for x in terms)
        return (function(q, k, PairTerms(gain, window, slope), rule),)

    label = f"relation_quadratic ({name}, {rule.norm}, {rule.activation})"
    return Check(label, partial(run, relation_quadratic), partial(run, relation_quadratic_reference), inputs)


def linear_checks() -> Iterator[Check]:
    def run(function: Callable, q: Tensor, k: Tensor, total: Tensor, **rule: Any) -> tuple[Tensor, Tensor]:
        state = LinearState(total, torch.ones(len(q), device=q.device))
        y, state = function(q, k, state, eps=EPS, **rule)
        return y, state.total

    def define_step(q: Tensor, k: Tensor, state: LinearState, eps: float) -> tuple[Tensor, LinearState]:
        y, state = relation_linear_reference(q[:, None], k[:, None], state, eps=eps)
        return y[:, 0], state

    for length, heads, channels in ((70, 1, 192), (40, 3, 33), (20, 1, 768), (5, 1, 3072)):
        q, k = torch.randn(2, 2, length, heads, channels)
        inputs = (2 * q, k + 1, 5 * torch.rand(2, heads, channels))
        for rule in ({"causal": True, "norm": "layer"}, {"causal": False, "norm": "rms"}):
            label = f"relation_linear ({length} x {heads} x {channels}, {rule})"
            operator = partial(run, relation_linear, **rule)
            yield Check(label, operator, partial(run, relation_linear_reference, **rule), inputs)
    inputs = (*torch.randn(2, 2, 3, 32), torch.rand(2, 3, 32))
    yield Check("relation_linear_step", partial(run, relation_linear_step), partial(run, define_step), inputs)
    yield Check(
        "relation_linear_total",
        lambda k: (relation_linear_total(k, eps=EPS),),
        lambda k: (definitions.normalise(k, "layer", EPS).exp().sum(1),),
        (torch.randn(2, 300, 1, 48),),
    )


def other_checks() -> Iterator[Check]:
    def normalise_by(function: Callable[..., Tensor], norm: str, x: Tensor) -> tuple[Tensor]:
        return (function(x, norm, EPS),)

    def step(q: Tensor, cache: Tensor) -> tuple[Tensor]:
        lengths = torch.full(q.shape[:1], 50, device=q.device)
        return (relation_quadratic_step(q, cache, lengths, PairTerms(), PairRule(EPS))[0],)

    def define_step(q: Tensor, cache: Tensor) -> tuple[Tensor]:
        return (relation_quadratic_reference(q[:, None], cache[:, :50], PairTerms(), PairRule(EPS))[:, 0],)

    for norm in ("layer", "rms"):
        operator = partial(normalise_by, normalise, norm)
        definition = partial(normalise_by, definitions.normalise, norm)
        yield Check(f"normalise ({norm})", operator, definition, (3 * torch.randn(4, 9, 100) + 1,))
    for channels in (48, 192):
        inputs = (torch.randn(3, 2, channels), torch.randn(3, 64, 2, channels))
        yield Check(f"relation_quadratic_step ({channels})", step, define_step, inputs, False)
    inputs = (torch.randn(3, 64), torch.randn(50, 64))
    yield Check("stored_linear", lambda *x: (stored_linear(*x),), lambda *x: (F.linear(*x),), inputs, False)


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
                    reason = " ".join(str(failure).split())[:300]
                    passed, outcome = False, f"{type(failure).__name__}: {reason}"
                failures += not passed
                print(f"{'ok  ' if passed else 'FAIL'} {label}: {outcome}", flush=True)
    print(f"{failures} checks failed" if failures else "all checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
