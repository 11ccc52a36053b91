"""Trains a model as a config says: `python -m causalrn.fit --config CONFIG [--config OVERLAY ...]`."""

import contextlib
import time

from causalrn import signals

if __name__ == "__main__":
    # A scheduler may announce the end of the job while the imports below still run.
    early = contextlib.ExitStack()
    early.enter_context(signals.listening())

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from causalrn.allocator import keep_freed_memory
from causalrn.callbacks import Preempted, RunFolder
from causalrn.callbacks.history import History
from causalrn.callbacks.run_folder import draw_curves, write_json
from causalrn.checkpoint import check_same_network
from causalrn.cli import CausalRNCLI, run_command
from causalrn.strategies import check_run
from causalrn.tables import print_results


def main(args: list[str] | None = None) -> None:
    start = time.monotonic()
    with signals.listening(), CausalRNCLI(args) as cli:
        history = next(one.history for one in cli.trainer.callbacks if isinstance(one, RunFolder))  # pyright: ignore[reportAttributeAccessIssue]
        history.began_seconds = start
        check_run(cli.trainer, cli.datamodule, cli.checkpoint)
        if cli.checkpoint is not None:
            check_same_network(cli.checkpoint, cli.model.network)
        try:
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.checkpoint)
            cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
        except Preempted as preempted:
            exit_code = preempted.exit_code
        else:
            finish(cli, history)
            exit_code = 0
        if torch.distributed.is_initialized():
            # Left to the interpreter's exit, a rank that ends late can abort a run that is done.
            torch.distributed.destroy_process_group()
    if exit_code:
        raise SystemExit(exit_code)


@rank_zero_only
def finish(cli: CausalRNCLI, history: History) -> None:
    """Leaves the curves and the final numbers in the run folder, and shows them."""
    results = {
        name: float(value) for name, value in cli.trainer.callback_metrics.items() if name.startswith("val/")
    }
    baselines = getattr(cli.datamodule, "baselines", dict)()
    history.update(cli.trainer.global_step)
    costs = history.costs()
    record = {
        "step": cli.trainer.global_step,
        **costs,
        "metrics": results,
        **({"baselines": baselines} if baselines else {}),
    }
    write_json(cli.run_dir / "results.json", record)
    draw_curves(cli.run_dir)
    print_results(results, baselines)
    of_them = f" ({costs['starts']} starts, the last one {costs['seconds_of_last_start']} s)"
    print(
        f"{cli.trainer.global_step} steps in {costs['seconds']} s{of_them if costs['starts'] > 1 else ''}; "
        f"everything is in {cli.run_dir}"
    )


if __name__ == "__main__":
    # A setting of the whole process: not for a caller of main.
    keep_freed_memory()
    run_command(main)
