"""When the Trainer writes what was logged: the only steps at which metrics that cost something are computed."""

import lightning as L


def is_log_step(trainer: L.Trainer, step: int) -> bool:
    """Whether the Trainer writes training metrics after optimizer step number `step`, counted from 1."""
    every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
    return every > 0 and step % every == 0
