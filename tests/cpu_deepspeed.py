"""ZeroStrategy on the CPU with gloo, for tests: DeepSpeed can, Lightning and ours want CUDA."""

import os

# Before deepspeed is imported: it would look for a GPU, and say that there is none.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from lightning.fabric.utilities.seed import reset_seed

from causalrn.training.strategies import ZeroStrategy


class CPUZeroStrategy(ZeroStrategy):
    """As its base; class_path: tests.cpu_deepspeed.CPUZeroStrategy."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def check_accelerator(self) -> None:
        import deepspeed.ops

        # Compiled at the first collective otherwise, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()
