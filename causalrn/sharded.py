"""Checkpoint folders that several ranks wrote (FSDP, DeepSpeed ZeRO), read as the one checkpoint they stand for."""

import contextlib
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

# What Lightning writes beside the shards of torch.distributed.checkpoint: all that is no tensor of the model.
EXTRA_FILE = "meta.pt"
# The folder within a DeepSpeed checkpoint, as Lightning names it.
DEEPSPEED_TAG = "checkpoint"


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a folder of either kind."""
    return (Path(path) / ".metadata").is_file() or (Path(path) / DEEPSPEED_TAG).is_dir()


def read_sharded(folder: str | Path) -> dict[str, Any]:
    """The content of the checkpoint as one rank would have written it, with weights in float32 where ZeRO keeps them so.

    Raises:
        ValueError: a shard is missing or broken, or deepspeed, which its folders need, is not installed.
    """
    folder = Path(folder)
    read = read_deepspeed if (folder / DEEPSPEED_TAG).is_dir() else read_distributed
    try:
        return read(folder)
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"checkpoint {folder} has shards missing or broken: {reason}") from error


def read_distributed(folder: Path) -> dict[str, Any]:
    """A folder of torch.distributed.checkpoint, as Lightning's FSDP and ModelParallel strategies write it."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = Path(scratch, "whole.pt")
        dcp_to_torch_save(folder, file)
        whole = torch.load(file, map_location="cpu", weights_only=True)
    extra = torch.load(folder / EXTRA_FILE, map_location="cpu", weights_only=True)
    return {**extra, "state_dict": whole["state_dict"]}


def read_deepspeed(folder: Path) -> dict[str, Any]:
    """A folder of DeepSpeed ZeRO, as Lightning's DeepSpeedStrategy writes it."""
    try:
        import deepspeed  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(
            f"checkpoint {folder} was written by DeepSpeed: pip install 'causalrn[deepspeed]' to read it"
        ) from None
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, contextlib.redirect_stdout(io.StringIO()):
        return convert_zero_checkpoint_to_fp32_state_dict(folder, Path(scratch, "whole.pt"), DEEPSPEED_TAG)
