"""Helpers of every benchmark: timing, peak memory, a description of the machine, files of results and their plots."""

import ctypes
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from causalrn.system import cpu_name, git_revision, new_figure, write_json

# Lines over an axis: label -> (x, y).
Lines = dict[str, tuple[Sequence[float], Sequence[float]]]


def median_seconds(
    call: Callable[[], object], device: torch.device, *, repeats: int = 20, budget_seconds: float = 5.0
) -> float:
    """Median wall-clock seconds of a call, after one that is not timed.

    Args:
        call: what to time; what it returns is dropped.
        device: waited for around each call.
        repeats: number of timed calls.
        budget_seconds: fewer calls, but at least 3, where `repeats` of them would take longer.
    """
    timed_seconds(call, device)
    times = [timed_seconds(call, device)]
    while len(times) < 3 or (len(times) < repeats and sum(times) < budget_seconds):
        times.append(timed_seconds(call, device))
    return statistics.median(times)


def timed_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory a call holds beyond what was held before it; None where the system does not tell.

    On a CPU this is resident memory, so what the allocator kept from earlier calls is first given back.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        trim = ctypes.CDLL(None).malloc_trim
        trim(0)
        # 5 resets the peak (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, command and date, for the record of a benchmark."""
    machine: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "revision": git_revision(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return machine


def file_record(folder: Path, name: str, record: dict[str, Any]) -> Path:
    """Writes a record as FOLDER/DATE_NAME.json and returns the path; its plot belongs beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.datetime.now(datetime.UTC).date()}_{name}.json"
    write_json(path, record)
    return path


def plot_panels(path: Path, title: str, x_label: str, panels: dict[str, Lines], y_scale: str = "log") -> None:
    """Draws lines over a shared logarithmic x axis, one panel per y label, into a PNG file."""
    figure = new_figure(5 * len(panels), 4)
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (y_label, lines) in zip(axes[0], panels.items(), strict=True):
        for label, (x, y) in lines.items():
            axis.plot(x, y, marker="o", markersize=3, label=label)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        # A logarithm wants something above 0 to show.
        shown = any(value > 0 for _, y in lines.values() for value in y)
        axis.set(yscale=y_scale if shown else "linear", xlabel=x_label, ylabel=y_label)
        axis.grid(which="both", alpha=0.2)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
