"""Exponents beyond the range of floats in the Triton kernels of the quadratic relation and of its step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from causalrn.ops.pairs import PairRule, PairTerms
from causalrn.ops.reference import relation_quadratic_log_reference
from tests.ops.quadratic.test_exponents import (
    SETTINGS,
    TOLERANCE,
    differentiate,
    make_cache,
    make_inputs,
    row_error,
    terms_and_rule,
)
from tests.ops.test_triton_aot import ARCHITECTURES, assert_compile, record_launches, use_config
from tests.ops.triton_device import (
    DEVICE,
    HAS_TRITON,
    INTERPRETED,
    assert_passes_interpreted,
    needs_device,
    starts_interpreter,
)

needs_compiler = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler")


@starts_interpreter
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_under_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


def run(inputs: tuple[torch.Tensor, ...], **settings: Any) -> dict[str, torch.Tensor]:
    """Values and gradients of the logarithm, by the kernels themselves."""
    from causalrn.ops.quadratic import gpu as quadratic_triton

    q, k, gain, grad = (x.to(DEVICE) for x in inputs)
    terms, rule = terms_and_rule(settings, torch.float32, gain)
    terms = PairTerms(*(None if x is None else x.to(DEVICE) for x in terms))
    shift = torch.zeros_like(q)
    out = quadratic_triton.forward(q, k, terms, rule, shift)
    gradients = quadratic_triton.backward(grad / out, q, k, terms, rule, shift)
    values = zip(("out", "dq", "dk", "dgain"), (out.log() + shift, *gradients), strict=True)
    return {name: x.cpu() for name, x in values if x is not None}


# Lanes behind the last position divide 0 by 0, which only the interpreter notices; nothing of theirs is kept.
@needs_device
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.usefixtures("poisoned_empty")
class TestKernels:
    @pytest.mark.parametrize("name", ["causal", "slope", "all"])
    def test_far_beyond_the_range(self, name: str) -> None:
        q, k, gain, grad = make_inputs(9, 20, 12)
        # Exponents of up to 260, as 3072 channels have at position 1e6.
        inputs = (q, k, torch.where(gain.abs() > 2, 75 * gain.sign(), gain), grad)
        self.check(inputs, name)

    def test_three_thousand_channels_at_a_million(self) -> None:
        self.check(make_inputs(7, 7, 3072, heads=1), "causal")

    def check(self, inputs: tuple[torch.Tensor, ...], name: str) -> None:
        exact = differentiate(relation_quadratic_log_reference, inputs, torch.float64, **SETTINGS[name])
        plain = differentiate(relation_quadratic_log_reference, inputs, torch.float32, **SETTINGS[name])
        ours = run(inputs, **SETTINGS[name])
        assert exact["out"].amax() > 88
        for key, wanted in exact.items():
            errors = [row_error(x[key], wanted) for x in (ours, plain)]
            assert errors[0] <= 2 * errors[1] + TOLERANCE, key

    def test_rows_in_range_are_those_of_the_plain_kernel(self) -> None:
        from causalrn.ops.quadratic import gpu as quadratic_triton

        q, k, gain, _ = (x.to(DEVICE) for x in make_inputs(9, 20, 12))
        gain = torch.where(gain.abs() > 2, 75.0, gain)
        shift = torch.zeros_like(q)
        out = quadratic_triton.forward(q, k, PairTerms(gain), PairRule(1e-5), shift)
        # The interpreter warns of what would be infinite.
        plain = quadratic_triton.forward(q, k, PairTerms(gain.clamp(-1, 1)), PairRule(1e-5))
        assert torch.equal(out[:, ::3], plain[:, ::3])
        assert not shift[:, ::3].any()

    def test_step(self) -> None:
        from causalrn.ops.quadratic import step_gpu as quadratic_step_triton

        q, cache, lengths, gain, exact = make_cache(150, 100, 27.0)
        q, cache, lengths, gain = (x.to(DEVICE) for x in (q, cache, lengths, gain))
        shift = torch.zeros_like(q)
        terms = PairTerms(gain, slope=torch.tensor([0.0, 1.5], device=DEVICE))
        out = quadratic_step_triton.step(q, cache, lengths, terms, PairRule(1e-5), shift)
        assert row_error((out.log() + shift).cpu(), exact) < 1e-5


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_ahead_of_time(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from causalrn.ops.quadratic import gpu as quadratic_triton
    from causalrn.ops.quadratic import step_gpu as quadratic_step_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    use_config(monkeypatch, quadratic_triton.TUNED[0])
    q, k = torch.randn(2, 1, 40, 2, 192, dtype=dtype)
    terms, rule = PairTerms(torch.ones(40, 2), torch.ones(2, dtype=torch.int32), torch.ones(2)), PairRule(0.0)
    shift = torch.zeros(q.shape)

    def launch() -> None:
        quadratic_triton.forward(q, k, terms, rule, shift)
        quadratic_triton.backward(q, q, k, terms, rule, shift)
        step_terms = terms._replace(gain=torch.ones(1, 2))
        quadratic_step_triton.step(q[:, 0].float(), k, torch.tensor([40]), step_terms, rule, shift[:, 0])

    launches = record_launches(monkeypatch, launch)
    kernels = [launch.kernel.__name__ for launch in launches]
    # One for the rows in range and one for those beyond, of each: out, dq, dk.
    assert kernels.count("_relation_kernel") == 6
    assert kernels.count("_step_kernel") == 1
    # The rows in range are done by the kernels of test_quadratic_variants.
    assert_compile([x for x in launches if x.arguments.get("SHIFTED")], ARCHITECTURES, tmp_path)
