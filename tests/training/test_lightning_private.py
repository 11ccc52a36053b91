"""Lightning still has every name that is used of it beyond its public interface."""

import re
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from causalrn.training import lightning_private
from tests import ROOT

# Attributes that are set on objects, by the object that has them.
NAMES = {
    "_data_fetcher": lambda trainer: trainer.fit_loop,
    "_should_check_val_fx": lambda trainer: trainer.fit_loop.epoch_loop,
    "_batches_that_stepped": lambda trainer: trainer.fit_loop.epoch_loop,
    "_broadcast_sigterm_tensor": lambda trainer: trainer.fit_loop.epoch_loop,
    "_restart_stage": lambda trainer: trainer.fit_loop.epoch_loop.val_loop,
    "_has_run": lambda trainer: trainer.fit_loop.epoch_loop.val_loop,
    "_signal_connector": lambda trainer: trainer,
    "_start_method": lambda trainer: _MultiProcessingLauncher(trainer.strategy),
    "_last_global_step_saved": lambda trainer: ModelCheckpoint(),
    "_save_topk_checkpoint": lambda trainer: ModelCheckpoint(),
    "_monitor_candidates": lambda trainer: ModelCheckpoint(),
}


def test_lightning_has_what_is_used() -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=True
    )
    source = Path(lightning_private.__file__).read_text()
    used = set(re.findall(r"\._[a-z]\w+", source)) | set(re.findall(r'"(_[a-z]\w+)"', source))
    assert {name.lstrip(".") for name in used} == set(NAMES)
    for name, owner in NAMES.items():
        assert hasattr(owner(trainer), name), name
    assert callable(trainer._signal_connector.register_signal_handlers)
    assert RestartStage.RESTARTED_MID_EVALUATION
    assert trainer.fit_loop.epoch_loop.state_dict()["state_dict"].keys() >= {"_batches_that_stepped"}


def test_nothing_else_is_used_of_the_loops() -> None:
    # The loops, the Trainer and its connectors by whatever name.
    private = re.compile(r"\b(trainer|loop|fit_loop|epoch_loop|val_loop|callback|launcher)\._[a-z]\w+")
    for path in sorted((ROOT / "causalrn").rglob("*.py")):
        if path.name != "lightning_private.py":
            assert not private.search(path.read_text()), path
