"""Norms against a plain computation at every step, with and without clipping, and nothing computed between log steps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from causalrn.cli import quiet_libraries
from causalrn.models import LanguageModel, LinearRelation
from causalrn.training.callbacks import Norms
from causalrn.training.callbacks.norms import block_of, norms
from causalrn.training.loggers import MetricsCSV, read_metrics
from causalrn.training.module import LanguageModelModule
from datamodules.tasks.copying import CopyDataModule


class Watch(L.Callback):
    """Keeps each step's gradients, parameters before and after, and whether Norms held a copy."""

    def __init__(self, norms: Norms) -> None:
        self.norms = norms
        self.steps: list[dict[str, Any]] = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        named = dict(pl_module.named_parameters())
        gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        before = {name: p.detach().clone() for name, p in named.items()}
        self.steps.append({"gradients": gradients, "before": before, "copied": self.norms.before is not None})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.steps:
            self.steps[-1]["after"] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def norm_of(tensors: dict[str, torch.Tensor], block: str = "") -> float:
    chosen = [value.flatten() for name, value in tensors.items() if not block or block_of(name) == block]
    return torch.cat(chosen).double().norm().item()


@pytest.mark.parametrize("clip", [None, 0.01])
def test_norms_are_those_of_the_step(clip: float | None, tmp_path: Path) -> None:
    quiet_libraries()
    callback = Norms()
    watch = Watch(callback)
    network = LanguageModel(LinearRelation(16, 24), vocab_size=29, n_layers=2, max_length=18)
    trainer = L.Trainer(
        max_steps=4,
        accumulate_grad_batches=2,
        log_every_n_steps=2,
        gradient_clip_val=clip,
        limit_val_batches=0,
        accelerator="cpu",
        logger=MetricsCSV(str(tmp_path)),
        callbacks=[callback, watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModelModule(network), CopyDataModule(batch_size=4, length=8, batches_per_epoch=8))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 3]
    assert [step["copied"] for step in watch.steps] == [False, True, False, True]
    for row, step in zip(rows, watch.steps[1::2], strict=True):
        assert row["train/grad_norm"] == pytest.approx(norm_of(step["gradients"]), rel=1e-5)
        blocks = {"block_00", "block_01", "head", "token_embedding", "position_embedding"}
        assert {name for name in row if name.startswith("norms/")} == {
            f"norms/{kind}/{block}" for kind in ("parameter", "update") for block in blocks
        }
        updates = {name: step["after"][name] - before for name, before in step["before"].items()}
        for block in blocks:
            assert row[f"norms/parameter/{block}"] == pytest.approx(norm_of(step["before"], block), rel=1e-5)
            assert row[f"norms/update/{block}"] == pytest.approx(norm_of(updates, block), rel=1e-5)


def test_norms_of_reduced_precision_are_taken_in_float32() -> None:
    (found,) = norms([torch.full((100_000,), 1.0, dtype=torch.bfloat16)])
    assert found.dtype is torch.float32
    assert found.item() == pytest.approx(100_000**0.5, rel=1e-4)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_sharded_weights(one_rank: DeviceMesh, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(5, 3, dtype=dtype)
    whole = norms([parameter.detach().clone() for parameter in layer.parameters()])
    fully_shard(layer, mesh=one_rank)
    sharded = [parameter.detach() for parameter in layer.parameters()]
    assert all(isinstance(one, DTensor) for one in sharded)
    assert torch.equal(norms(sharded), whole)
    assert whole.dtype == torch.float32
