"""Trains a small model on two ranks of a CPU and saves it in shards: `sharded_run.py fsdp|deepspeed FOLDER`."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from causalrn.lit_module import CopyModule
from causalrn.models import LanguageModel, QuadraticRelation
from datamodules.copying import CopyDataModule


class SmallModule(CopyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ShardedModule(SmallModule):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        for part in (*self.network.layers, self.network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class CPUDeepSpeed(DeepSpeedStrategy):
    """Lightning's strategy without its refusal of anything but CUDA."""

    def setup_environment(self) -> None:
        import deepspeed  # pyright: ignore[reportMissingImports]

        # Not compiled, which would take a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.accelerator.setup_device(self.root_device)  # pyright: ignore[reportOptionalMemberAccess]
        self.setup_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu")

    def setup_distributed(self) -> None:
        import deepspeed  # pyright: ignore[reportMissingImports]

        self._setup_distributed_env() if hasattr(self, "_setup_distributed_env") else None
        os.environ["MASTER_ADDR"] = self.cluster_environment.main_address  # pyright: ignore
        os.environ["MASTER_PORT"] = str(self.cluster_environment.main_port)  # pyright: ignore
        os.environ["RANK"] = str(self.global_rank)
        os.environ["WORLD_SIZE"] = str(self.world_size)
        os.environ["LOCAL_RANK"] = str(self.local_rank)
        deepspeed.init_distributed("gloo")


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    L.seed_everything(1)
    network = LanguageModel(QuadraticRelation(8, 12), vocab_size=29, n_layers=2, max_length=10)
    module: L.LightningModule
    strategy: Strategy
    if kind == "fsdp":
        module = ShardedModule(network)
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    else:
        module = SmallModule(network)
        strategy = CPUDeepSpeed(stage=2, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, CopyDataModule(length=4, batch_size=4))
    trainer.save_checkpoint(folder / "sharded.ckpt")
    whole = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.is_global_zero:
        torch.save(
            {name: weight for name, weight in whole.items() if isinstance(weight, torch.Tensor)},
            folder / "whole.pt",
        )
    assert isinstance(module.network, nn.Module)


if __name__ == "__main__":
    main()
