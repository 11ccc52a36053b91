"""Lightning still has every name that is used of it beyond its public interface, and nothing else uses such names."""

import re
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.evaluation_loop import RestartStage

from causalrn.training import lightning_private
from tests import ROOT

# Attributes that are set on objects, by the object that has them.
NAMES = {
    "_should_check_val_fx": lambda trainer: trainer.fit_loop.epoch_loop,
    "_batches_that_stepped": lambda trainer: trainer.fit_loop.epoch_loop,
    "_broadcast_sigterm_tensor": lambda trainer: trainer.fit_loop.epoch_loop,
    "_restart_stage": lambda trainer: trainer.fit_loop.epoch_loop.val_loop,
    "_has_run": lambda trainer: trainer.fit_loop.epoch_loop.val_loop,
    "_signal_connector": lambda trainer: trainer,
}
# Of DeepSpeed, in strategies/zero.py: tests/training/strategies fail where it is gone.
OF_DEEPSPEED = {"_lazy_init_hp_params_optimizer_state"}
# Names that are public by their documentation.
PUBLIC = {"_asdict", "_exit", "_fields", "_replace", "_fields_", "_name", "_version"}


def test_lightning_has_what_is_used() -> None:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=True
    )
    source = Path(lightning_private.__file__).read_text()
    used = set(re.findall(r"\.(_[a-z]\w+)", source)) | set(re.findall(r'"(_[a-z]\w+)"', source))
    assert used == set(NAMES)
    for name, owner in NAMES.items():
        assert hasattr(owner(trainer), name), name
    assert callable(trainer._signal_connector.register_signal_handlers)
    # Used by its subclass Checkpoints.
    assert callable(ModelCheckpoint._save_topk_checkpoint)
    assert RestartStage.RESTARTED_MID_EVALUATION
    assert trainer.fit_loop.epoch_loop.state_dict()["state_dict"].keys() >= {"_batches_that_stepped"}


def test_no_other_private_name_of_another_object_is_used() -> None:
    foreign = re.compile(r"(?<!\bself)(?<!\bcls)\.(_[a-z]\w*)|getattr\(\w+, \"(_[a-z]\w*)\"")
    for path in sorted((ROOT / "causalrn").rglob("*.py")):
        if path.name != "lightning_private.py":
            found = {one or other for one, other in foreign.findall(path.read_text())}
            allowed = PUBLIC | (OF_DEEPSPEED if path.name == "zero.py" else set())
            assert found <= allowed, (path, found - allowed)
