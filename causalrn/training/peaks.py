"""Peak rates of devices, dense matrix FLOP/s and exponentials per second: by name, or measured on a CPU."""

from dataclasses import dataclass

import torch

from causalrn.ops.exp_probe import measure_exp_rate

# Exponentials per clock of the special-function units of an SM, from compute capability 7.0 to 10.0.
EXPS_PER_CLOCK = 16


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet, without structured sparsity (data sheets often print the sparse figure, twice the dense one).

    Attributes:
        half_flops: per second, 16-bit inputs on the tensor cores with float32 sums.
        float32_flops: per second, without tensor cores.
        sms: streaming multiprocessors.
        clock_hz: boost clock.
        bfloat16: whether the tensor cores take bfloat16, and with it TF32; else float16 only.
    """

    half_flops: float
    float32_flops: float
    sms: int
    clock_hz: float
    bfloat16: bool = True

    @property
    def exps(self) -> float:
        return EXPS_PER_CLOCK * self.sms * self.clock_hz

    def flops(self, precision: str) -> float | None:
        """Dense peak of matrix products at one of the Trainer's precisions; None where the hardware has none."""
        if precision.startswith("bf16"):
            return self.half_flops if self.bfloat16 else None
        if precision.startswith("16"):
            return self.half_flops
        if not precision.startswith("32"):
            return None
        # TF32 runs at half the rate of bfloat16 on every tensor core that has both.
        tf32 = self.bfloat16 and torch.get_float32_matmul_precision() != "highest"
        return self.half_flops / 2 if tf32 else self.float32_flops


A100 = Gpu(312e12, 19.5e12, 108, 1.41e9)
H100_SXM = Gpu(989.4e12, 66.9e12, 132, 1.98e9)
H100_PCIE = Gpu(756e12, 51.2e12, 114, 1.755e9)
H100_NVL = Gpu(835e12, 60.3e12, 132, 1.785e9)
V100_SXM = Gpu(125e12, 15.7e12, 80, 1.53e9, bfloat16=False)

# The keys are names that the driver gives (torch.cuda.get_device_name). Parts of a GPU (MIG) and laptop variants have
# other names.
GPUS = {
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA H100 80GB HBM3": H100_SXM,
    "NVIDIA H100 PCIe": H100_PCIE,
    "NVIDIA H100 NVL": H100_NVL,
    "NVIDIA H200": H100_SXM,
    "NVIDIA H200 NVL": H100_NVL,
    "NVIDIA GH200 480GB": H100_SXM,
    "NVIDIA B200": Gpu(2250e12, 75e12, 148, 1.965e9),
    "NVIDIA A10": Gpu(125e12, 31.2e12, 72, 1.695e9),
    "NVIDIA L4": Gpu(121e12, 30.3e12, 58, 2.04e9),
    "NVIDIA L40S": Gpu(362e12, 91.6e12, 142, 2.52e9),
    "NVIDIA RTX A6000": Gpu(154.8e12, 38.7e12, 84, 1.8e9),
    "NVIDIA RTX 6000 Ada Generation": Gpu(364e12, 91.1e12, 142, 2.505e9),
    "NVIDIA GeForce RTX 3090": Gpu(71e12, 35.6e12, 82, 1.695e9),
    "NVIDIA GeForce RTX 4090": Gpu(165.2e12, 82.6e12, 128, 2.52e9),
    "NVIDIA GeForce RTX 5090": Gpu(209.5e12, 104.8e12, 170, 2.407e9),
    "Tesla V100-SXM2-16GB": V100_SXM,
    "Tesla V100-SXM2-32GB": V100_SXM,
    "Tesla T4": Gpu(65e12, 8.1e12, 40, 1.59e9, bfloat16=False),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense matrix FLOP/s of a device at a Trainer's precision, or None where this is not known."""
    gpu = find_gpu(device)
    return None if gpu is None else gpu.flops(precision)


def peak_exps(device: torch.device) -> float | None:
    """Exponentials per second of a device, or None where this is not known; on a CPU they are measured (milliseconds)."""
    if device.type == "cpu":
        return measure_exp_rate()
    gpu = find_gpu(device)
    return None if gpu is None else gpu.exps


def find_gpu(device: torch.device) -> Gpu | None:
    return GPUS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
