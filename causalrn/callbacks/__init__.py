"""Lightning callbacks: progress, the run folder, bad losses, samples of text, longer lengths, throughput, norms, diagnostics."""

from causalrn.callbacks.diagnostics import Diagnostics
from causalrn.callbacks.finite_loss import FiniteLoss
from causalrn.callbacks.length_extrapolation import LengthExtrapolation
from causalrn.callbacks.norms import Norms
from causalrn.callbacks.progress import PlainProgress, progress_bar
from causalrn.callbacks.run_folder import RunFolder
from causalrn.callbacks.sample_text import SampleText
from causalrn.callbacks.throughput import Throughput

__all__ = [
    "Diagnostics",
    "FiniteLoss",
    "LengthExtrapolation",
    "Norms",
    "PlainProgress",
    "RunFolder",
    "SampleText",
    "Throughput",
    "progress_bar",
]
