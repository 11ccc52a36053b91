"""Trains a model as a config says: `python -m causalrn.fit --config CONFIG [--config OVERLAY ...]`."""

import contextlib

from causalrn.training import signals

if __name__ == "__main__":
    # A scheduler may announce the end of the job, or somebody press Ctrl-C, while the imports below still run.
    early = contextlib.ExitStack()
    early.enter_context(signals.listening(importing=True))

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from causalrn.cli import CLI
from causalrn.reporting.terminal import print_results
from causalrn.system import write_json
from causalrn.training.allocator import keep_freed_memory
from causalrn.training.callbacks import Preempted
from causalrn.training.changes import check_continues, load_weights
from causalrn.training.checkpoint import progress
from causalrn.training.checkpoint_io import PREEMPTED
from causalrn.training.errors import run_command
from causalrn.training.history import costs
from causalrn.training.resume import first_process
from causalrn.training.run_folder import draw_curves
from causalrn.training.strategies import check_run
from causalrn.training.trainer_settings import check_trainer


def main(args: list[str] | None = None) -> None:
    with signals.listening(), CLI(args).open() as cli:
        check_run(cli.trainer, cli.datamodule, cli.start.checkpoint)
        check_trainer(cli.trainer, cli.model, cli.datamodule)
        begin(cli)
        try:
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.start.checkpoint)
            cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
        except Preempted as preempted:
            exit_code = preempted.exit_code
        else:
            finish(cli)
            exit_code = 0
        if torch.distributed.is_initialized():
            # Left to the interpreter's exit, a rank that ends late can abort a run that is done.
            torch.distributed.destroy_process_group()
    if exit_code:
        raise SystemExit(exit_code)


def begin(cli: CLI) -> None:
    """Says what the run comes from, if from another start, and which settings it changes."""
    lines = []
    if cli.start.checkpoint is not None:
        lines = check_continues(cli.start.checkpoint, cli.model.network, cli.datamodule, cli.resolved)
        lines = [
            f"continues {cli.start.checkpoint}, step {progress(cli.start.checkpoint)[0]}",
            *(f"changed {line}" for line in lines),
        ]
    elif cli.start.weights is not None:
        load_weights(cli.start.weights, cli.model.network)
        lines = [f"begins with the weights of {cli.start.weights}"]
    if first_process():
        cli.start.note_origin()
        for line in lines:
            print(line, flush=True)


@rank_zero_only
def finish(cli: CLI) -> None:
    """Leaves the curves and the final numbers in the run folder, and shows them."""
    results = {
        name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith("val/")
    }
    baselines = getattr(cli.datamodule, "baselines", dict)()
    spent = costs(cli.start.run_dir)
    record = {
        "step": cli.trainer.global_step,
        **spent,
        "metrics": results,
        **({"baselines": baselines} if baselines else {}),
    }
    write_json(cli.start.run_dir / "results.json", record)
    # fast_dev_run logs nothing.
    if (cli.start.run_dir / "metrics.csv").exists():
        draw_curves(cli.start.run_dir)
    for link in (cli.start.run_dir / "checkpoints").glob(f"{PREEMPTED}*.ckpt"):
        # Marks a closing validation that was cut short.
        if link.is_symlink():
            link.unlink()
    print_results(results, baselines)
    of_them = f" ({spent['starts']} starts, the last one {spent['seconds_of_last_start']} s)"
    print(
        f"{cli.trainer.global_step} steps in {spent['seconds']} s{of_them if spent['starts'] > 1 else ''}; "
        f"everything is in {cli.start.run_dir}"
    )


if __name__ == "__main__":
    # This setting holds for the whole process, so main leaves it to the command.
    keep_freed_memory()
    run_command(main)
