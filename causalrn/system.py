"""The machine and its memory, the revision of the code, and small helpers for files, locks and ranges of settings."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from datamodules.errors import optional_module
from datamodules.files import Lock, is_locked, replacing, write_atomically, write_json
from datamodules.ranges import check_options, check_range

__all__ = [
    "Lock",
    "available_bytes",
    "check_options",
    "check_range",
    "cpu_name",
    "environment",
    "flatten",
    "format_bytes",
    "git",
    "git_revision",
    "is_locked",
    "new_figure",
    "optional_module",
    "replacing",
    "write_atomically",
    "write_json",
]

PACKAGES = ("causalrn", "torch", "lightning", "triton", "deepspeed", "webdataset", "numpy")
CGROUP = Path("/sys/fs/cgroup")


def environment() -> dict[str, Any]:
    """Git revision, command, versions and hardware, for the record."""
    return {
        "git_revision": git_revision(),
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git(*arguments: str) -> str | None:
    """The output of git in the checkout that this code runs from, or None where there is no checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def git_revision() -> str | None:
    """Commit of the checkout that this code runs from, with "-dirty" when files differ from it, or None."""
    found = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return found.strip() if found is not None else None


def package_version(name: str) -> str | None:
    if name == "torch":
        # Tells the build too, which the package's own version may not.
        return torch.__version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [left for left in (system_bytes(), cgroup_bytes()) if left is not None]
    return min(limits, default=None)


def system_bytes() -> int | None:
    """The memory that a new program can take without swapping, as Linux estimates it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def cgroup_bytes() -> int | None:
    """The memory that the container or the batch job still allows."""
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return None
    return int(limit) - int(used) if limit.isdigit() else None


def format_bytes(count: float) -> str:
    """A number of bytes with a unit, as "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def new_figure(width: float, height: float) -> Any:
    """An empty picture of so many inches: a Figure of matplotlib, which is slow to import and needed by few commands."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every plain value of a config by its dotted key; a list of mappings counts its entries, as `mixer.0.d_model`."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        items = ((str(number), inner) for number, inner in enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
