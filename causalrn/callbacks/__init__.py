"""Lightning callbacks: progress, the run folder, checks on the loss."""

from causalrn.callbacks.finite_loss import FiniteLoss
from causalrn.callbacks.progress import PlainProgress, progress_bar
from causalrn.callbacks.run_folder import RunFolder

__all__ = ["FiniteLoss", "PlainProgress", "RunFolder", "progress_bar"]
