"""Lightning callbacks: progress, run folder, checkpoints, preemption, hangs, bad losses, samples, and what is measured."""

from causalrn.callbacks.checkpoints import Checkpoints
from causalrn.callbacks.configured_values import ConfiguredValues
from causalrn.callbacks.diagnostics import Diagnostics
from causalrn.callbacks.finite_loss import FiniteLoss
from causalrn.callbacks.heartbeat import Heartbeat
from causalrn.callbacks.length_extrapolation import LengthExtrapolation
from causalrn.callbacks.norms import Norms
from causalrn.callbacks.preemption import Preempted, Preemption
from causalrn.callbacks.progress import PlainProgress, progress_bar
from causalrn.callbacks.resumed_loops import ResumedLoops
from causalrn.callbacks.run_folder import RunFolder
from causalrn.callbacks.sample_text import SampleText
from causalrn.callbacks.throughput import Throughput
from causalrn.callbacks.whole_steps import WholeSteps

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
