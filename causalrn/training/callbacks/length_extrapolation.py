"""Shows in every run how a model does beyond its training length: metrics, a table and a picture."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.trainer.states import TrainerFn

from causalrn.evaluation.length_report import draw_lengths, read_table, table_rows, write_table
from causalrn.evaluation.lengths import Bounds, LengthResults, evaluate_lengths, powers_of_two
from causalrn.evaluation.metrics import is_text
from causalrn.system import check_range

TABLE = "length_extrapolation.csv"
PICTURE = "length_extrapolation.png"


class LengthExtrapolation(L.Callback):
    """Evaluates any task, or text, at 1, 2, 4, ... times the longest training length.

    Logs `val/exact_match/length_256` and likewise the other metrics of each length, for text `val/loss/length_256` and
    `val/loss/positions_64_128`, the loss on positions 64 to 127 of the longest blocks. Each is a metric like any other,
    so EarlyStopping and ModelCheckpoint can monitor it; let it be measured at every validation then. The run
    folder gets `length_extrapolation.csv`, with the rows of every evaluation, and `length_extrapolation.png`.

    The samples are the DataModule's validation samples of each length, split over the ranks. A network that cannot run
    at a length ends the evaluation there, with one warning; so do a task without samples of it, and the time.

    Args:
        factor: the longest length, in longest training lengths; powers of two up to it.
        lengths: the lengths themselves, in place of those.
        every_n_steps: also at the first validation at or after each multiple of so many optimizer steps; null for the
            end only.
        samples: strings at each length (text: blocks of the training context, whose tokens longer blocks share).
        tokens_per_batch: tokens that each rank holds at a time; the batch shrinks with the length.
        max_seconds: the evaluation ends after these.

    Raises:
        ValueError: no lengths, or bounds that nothing fits into.
    """

    def __init__(
        self,
        factor: int = 16,
        lengths: list[int] | None = None,
        every_n_steps: int | None = None,
        samples: int = 64,
        tokens_per_batch: int = 16384,
        max_seconds: float = 120.0,
    ) -> None:
        check_range(self, "[1, inf)", factor=factor, lengths=lengths, every_n_steps=every_n_steps)
        if lengths is not None and not lengths:
            raise ValueError("lengths must be at least one length of 1 or more, or null: got []")
        self.factor = factor
        self.lengths = lengths
        self.every_n_steps = every_n_steps
        self.bounds = Bounds(samples, tokens_per_batch, max_seconds=max_seconds)
        self.last_step = 0
        self.results: LengthResults | None = None
        # Tells the weights that `results` was measured with.
        self.fingerprint: tuple[int, ...] = ()
        self.said: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.data: Any = getattr(trainer, "datamodule", None)
        if not all(hasattr(self.data, name) for name in ("training_lengths", "positions", "length_loader")):
            raise ValueError(
                f"{type(self).__name__} needs a DataModule with samples of any length: got {type(self.data).__name__}"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        step = trainer.global_step
        if trainer.state.fn == TrainerFn.FITTING:
            every = self.every_n_steps
            if every is None or step // every == self.last_step // every:
                return
        found = self.measure(trainer, pl_module)
        self.last_step = step
        names = getattr(self.data, "val_names", [])
        for name, value in found.metrics(self.context).items():
            # A validation set of the same name has been logged under it already.
            if name.rpartition("/")[2] not in names or len(names) == 1 or "/first_error/" in name:
                # Every rank holds the same value already; sync_dist says so to Lightning.
                pl_module.log(name, value, sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Some runs end without a validation; where one follows, it finds the weights unchanged and measures nothing.
        self.measure(trainer, pl_module)

    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> LengthResults:
        """The results of the weights as they are, measured once."""
        network = pl_module.network
        assert isinstance(network, torch.nn.Module)
        fingerprint = (trainer.global_step, *(parameter._version for parameter in network.parameters()))
        if self.results is not None and fingerprint == self.fingerprint:
            return self.results
        training = network.training
        self.results = evaluate_lengths(
            network.eval(),
            self.data,
            powers_of_two(self.data, self.factor) if self.lengths is None else self.lengths,
            self.bounds,
            device=pl_module.device,
            context=trainer.precision_plugin.val_step_context,
            any_rank=partial(trainer.strategy.reduce_boolean_decision, all=False),
        )
        network.train(training)
        self.fingerprint = fingerprint
        self.report(trainer, self.results)
        return self.results

    @rank_zero_only
    def report(self, trainer: L.Trainer, found: LengthResults) -> None:
        """Warns of an end before the last length, once, and writes table and picture."""
        if found.ended and found.ended not in self.said:
            self.said.add(found.ended)
            warnings.warn(f"{type(self).__name__}: {found.ended}", stacklevel=2)
        if not found.results:
            return
        folder, context = Path(trainer.default_root_dir), self.context
        folder.mkdir(parents=True, exist_ok=True)
        step = trainer.global_step
        before = read_table(folder / TABLE) if (folder / TABLE).exists() else []
        # A resumed run measures its steps anew.
        before = [row for row in before if int(row["step"]) < step]
        write_table(folder / TABLE, before + table_rows(found, step, context))
        title = f"{folder.name}, step {step}"
        draw_lengths(folder / PICTURE, found, self.data.training_lengths, title, context)

    @property
    def context(self) -> int | None:
        """The training context of text, None for a task."""
        return self.data.training_lengths[1] if is_text(self.data) else None
