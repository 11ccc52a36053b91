"""Lightning callbacks: progress, run folder, checkpoints, preemption, hangs, bad losses, samples, and what is measured."""

from causalrn.training.callbacks.checkpoints import Checkpoints
from causalrn.training.callbacks.configured_values import ConfiguredValues
from causalrn.training.callbacks.diagnostics import Diagnostics
from causalrn.training.callbacks.finite_loss import FiniteLoss
from causalrn.training.callbacks.heartbeat import Heartbeat
from causalrn.training.callbacks.length_extrapolation import LengthExtrapolation
from causalrn.training.callbacks.norms import Norms
from causalrn.training.callbacks.progress import PlainProgress, progress_bar
from causalrn.training.callbacks.resumed_loops import ResumedLoops
from causalrn.training.callbacks.sample_text import SampleText
from causalrn.training.callbacks.throughput import Throughput
from causalrn.training.callbacks.whole_steps import WholeSteps
from causalrn.training.preemption import Preempted, Preemption
from causalrn.training.run_folder import RunFolder

__all__ = [
    "Checkpoints",
    "ConfiguredValues",
    "Diagnostics",
    "FiniteLoss",
    "Heartbeat",
    "LengthExtrapolation",
    "Norms",
    "PlainProgress",
    "Preempted",
    "Preemption",
    "ResumedLoops",
    "RunFolder",
    "SampleText",
    "Throughput",
    "WholeSteps",
    "progress_bar",
]
