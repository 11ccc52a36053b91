"""metrics.csv: one row per step, continued without doubled steps, readable after a kill."""

from pathlib import Path

from causalrn.training.loggers import MetricsCSV, read_metrics


def test_metrics_of_one_step_share_a_row(tmp_path: Path) -> None:
    logger = MetricsCSV(str(tmp_path))
    logger.log_metrics({"train/loss": 3.0}, 1)
    logger.log_metrics({"train/loss": 2.0}, 2)
    logger.log_metrics({"val/loss": 2.5}, 2)
    logger.finalize("success")
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.0, "val/loss": 2.5},
    ]


def test_a_new_column_keeps_the_rows_written_before(tmp_path: Path) -> None:
    logger = MetricsCSV(str(tmp_path))
    for step in range(7):
        logger.log_metrics({"train/loss": float(step)}, step)
    logger.log_metrics({"val/loss": 9.0}, 7)
    logger.finalize("success")
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(8))
    assert rows[3] == {"step": 3, "train/loss": 3.0}
    assert rows[7] == {"step": 7, "val/loss": 9.0}


def test_a_resumed_run_replaces_the_steps_it_takes_again(tmp_path: Path) -> None:
    first = MetricsCSV(str(tmp_path))
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step)
    first.finalize("success")
    resumed = MetricsCSV(str(tmp_path), first_step=4)
    for step in range(4, 8):
        resumed.log_metrics({"train/loss": 10.0 + step}, step)
    resumed.finalize("success")
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert losses == [0, 1, 2, 3, 14, 15, 16, 17]


def test_a_run_preempted_in_a_validation_completes_the_row(tmp_path: Path) -> None:
    first = MetricsCSV(str(tmp_path))
    for step in range(4):
        first.log_metrics({"train/loss": float(step)}, step)
    # Of a closing validation, which the resumed run makes again at its own end.
    first.log_metrics({"val/loss": 9.0}, 4)
    first.finalize("success")
    resumed = MetricsCSV(str(tmp_path), first_step=4)
    resumed.log_metrics({"val/loss": 5.0}, 3)
    resumed.log_metrics({"train/loss": 4.0}, 4)
    resumed.finalize("success")
    assert read_metrics(tmp_path / "metrics.csv")[3:] == [
        {"step": 3, "train/loss": 3.0, "val/loss": 5.0},
        {"step": 4, "train/loss": 4.0},
    ]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n1,3.5\n2,3.")
    assert read_metrics(path) == [{"step": 1, "train/loss": 3.5}]
    logger = MetricsCSV(str(tmp_path), first_step=2)
    logger.log_metrics({"train/loss": 3.25}, 2)
    logger.finalize("success")
    assert [row["train/loss"] for row in read_metrics(path)] == [3.5, 3.25]
