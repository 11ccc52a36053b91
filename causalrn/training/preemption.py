"""Answers a scheduler's signal or Ctrl-C at the next boundary of a step: checkpoint, back into the queue, exit."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from causalrn.training import signals
from causalrn.training.callbacks.log_steps import ends_a_step, is_log_step, write_metrics
from causalrn.training.checkpoint_io import PREEMPTED
from causalrn.training.lightning_private import begin_with_validation, validation_follows
from causalrn.training.random_state import RandomState, gather_random_states, restore_random_state


class Preempted(Exception):  # noqa: N818 - nothing went wrong
    """Ends a run that a signal asked to leave, its checkpoint on disk.

    Args:
        exit_code: 0 where the job is in the queue again, and on every rank but the first: a launcher would take
            another rank's code for a failure and kill the first.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"preempted, exit code {exit_code}")
        self.exit_code = exit_code


class Preemption(L.Callback):
    """Saves and leaves once any rank was signalled, at the end of a training or validation step.

    The ranks' signals are combined by an all-reduce on the host, started after each step and read after the next, so
    that nobody waits for it and all ranks leave at the same step. A validation that is cut short, or due, is run
    from its beginning by the next start. Every checkpoint gets the random state of every rank.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.pending: tuple[dist.Work, torch.Tensor] | None = None
        self.received: set[int] = set()
        # The random states that a resumed validation must begin with, while one is due or running.
        self.before_validation: list[RandomState] | None = None
        self.loaded: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # A group of its own, on the host: a flag must neither queue between gradients nor make a device wait.
        if self.group is None and dist.is_initialized() and trainer.world_size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self.group = group

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.loaded = checkpoint.get("preemption", {})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Before this there was nothing that a checkpoint could hold.
        signals.save_at_interrupt(says=trainer.is_global_zero)
        loaded, self.loaded = self.loaded, {}
        if not loaded:
            return
        restore_random_state(loaded["random_states"], trainer.global_rank)
        if loaded["validation_is_due"]:
            # It may be cut short again.
            self.before_validation = gather_random_states(self.group)
            begin_with_validation(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        # Within an accumulation, a checkpoint would lose the gradients so far.
        if not ends_a_step(trainer):
            return
        stop = self.any_rank_was_signalled()
        if validation_follows(trainer):
            # The next hook is on_validation_start.
            self.before_validation = gather_random_states(self.group)
        elif stop:
            self.save_and_leave(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking and self.any_rank_was_signalled():
            self.save_and_leave(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.sanity_checking and self.any_rank_was_signalled():
            self.save_and_leave(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before_validation = None

    def checkpoint_content(self, weights_only: bool) -> dict[str, Any]:
        if weights_only:
            return {}
        content = {
            "random_states": self.before_validation or gather_random_states(self.group),
            "validation_is_due": self.before_validation is not None,
        }
        return {"preemption": content}

    def any_rank_was_signalled(self) -> bool:
        """Whether all ranks know of a signal; every rank gets the same answer, one call after the signal."""
        here = signals.received()
        if self.group is None:
            self.received = here
            return bool(here)
        flags = torch.tensor([number in here for number in signals.ANNOUNCED], dtype=torch.int32)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, self.group, async_op=True)
        assert work is not None
        previous, self.pending = self.pending, (work, flags)
        if previous is not None:
            previous[0].wait()
            flags = zip(signals.ANNOUNCED, previous[1].tolist(), strict=True)
            self.received = {number for number, flag in flags if flag}
        return bool(self.received)

    def save_and_leave(self, trainer: L.Trainer) -> None:
        """Raises Preempted, with the checkpoint complete and the job in the queue where that is possible."""
        folder = Path(trainer.default_root_dir, "checkpoints")
        path = folder / f"{PREEMPTED}step={trainer.global_step}.ckpt"
        if trainer.state.fn == "fit":
            trainer.save_checkpoint(path)
        elif trainer.is_global_zero and (folder / "last.ckpt").exists():
            # The closing validation changes nothing that a checkpoint holds, and the next start must find that it is due.
            path.unlink(missing_ok=True)
            path.symlink_to((folder / "last.ckpt").readlink())
        trainer.strategy.checkpoint_io.teardown()
        if trainer.training and is_log_step(trainer, trainer.global_step):
            # Lightning logs the step after this hook, which does not return. Values of an earlier validation are among
            # what it holds, and were logged then.
            found = trainer.logged_metrics.items()
            values = {name: float(value) for name, value in found if not name.startswith("val/")}
            write_metrics(trainer, {**values, "epoch": trainer.current_epoch})
        for logger in trainer.loggers:
            logger.finalize("preempted")
        trainer.strategy.barrier("preempted")
        exit_code = 0
        if trainer.is_global_zero:
            requeued = signals.requeue(self.received)
            interrupted = signal.SIGINT in self.received
            exit_code = 0 if requeued else signals.EXIT_INTERRUPTED if interrupted else signals.EXIT_RESUME
            names = ", ".join(signal.Signals(number).name for number in sorted(self.received))
            then = "back in the queue" if requeued else f"exit code {exit_code}, start again to continue"
            print(f"{names}: saved at step {trainer.global_step}; {then}", flush=True)
        raise Preempted(exit_code)
