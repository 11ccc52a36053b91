"""The table of peaks agrees with itself, is dense, and is asked by the driver's names."""

import pytest
import torch

from causalrn.training import peaks
from causalrn.training.peaks import GPUS, peak_exps, peak_flops

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("name", GPUS)
def test_figures_of_one_card_agree(name: str) -> None:
    card = GPUS[name]
    # A streaming multiprocessor has 64 or 128 float32 lanes, each a multiply-add per clock.
    lanes = card.float32_flops / (2 * card.sms * card.clock_hz)
    assert min(abs(lanes / 64 - 1), abs(lanes / 128 - 1)) < 0.03
    # Dense tensor cores do 256, 512, 1024, 2048 or 4096 multiply-adds per multiprocessor and clock. Tensor-bound
    # figures are stated at lower clocks than the boost clock, by up to 15 %.
    adds = card.half_flops / (2 * card.sms * card.clock_hz)
    assert any(0.75 < adds / 2**power < 1.05 for power in range(8, 13)), adds


@pytest.mark.parametrize("gpu", ["NVIDIA H200"], indirect=True)
def test_precisions(gpu: str) -> None:
    # Dense: the data sheet's 1,979 TFLOP/s are for structured sparsity.
    assert peak_flops(CUDA, "bf16-mixed") == peak_flops(CUDA, "16-mixed") == 989.4e12
    assert peak_flops(CUDA, "32-true") == 66.9e12
    assert peak_flops(CUDA, "64-true") is None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops(CUDA, "32-true") == 989.4e12 / 2
    finally:
        torch.set_float32_matmul_precision(before)
    assert peak_exps(CUDA) == 132 * 16 * 1.98e9


@pytest.mark.parametrize("gpu", ["Tesla V100-SXM2-32GB"], indirect=True)
def test_cards_without_bfloat16(gpu: str) -> None:
    assert peak_flops(CUDA, "16-mixed") == 125e12
    assert peak_flops(CUDA, "bf16-mixed") is None


@pytest.mark.parametrize(
    "gpu", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L40", "something new"], indirect=True
)
def test_an_unknown_card_has_no_peak(gpu: str) -> None:
    assert peak_flops(CUDA, "bf16-mixed") is None
    assert peak_exps(CUDA) is None


def test_a_cpu_is_measured() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "32-true") is None
    rate = peaks.peak_exps(cpu)
    assert rate is not None
    assert 1e6 < rate < 1e13
