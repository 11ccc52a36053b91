"""Reading and writing self-describing checkpoints: the network is rebuilt from the file alone."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from causalrn.models import LanguageModel, build, describe
from causalrn.sharded import read_content, read_sharded

# A LightningModule holds the network under this name.
PREFIX = "network."


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's plain content: `network` (its description), `state_dict`, and what training added.

    A folder that several ranks wrote (ZeRO, FSDP) is put together in memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, or was not written by this project.
    """
    if Path(path).is_dir():
        return read_sharded(Path(path))
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {path} is truncated or no checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"network", "state_dict"} <= checkpoint.keys():
        raise ValueError(
            f"checkpoint {path} is of another program: want one with the keys network and state_dict"
        )
    return checkpoint


def load_network(path: str | Path, map_location: str | torch.device = "cpu") -> LanguageModel:
    """The network of a checkpoint, with its weights, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`; also weights that do not fit the description.
    """
    return network_from(read_checkpoint(path), path).to(map_location)


def network_from(checkpoint: dict[str, Any], path: str | Path) -> LanguageModel:
    """The network of a checkpoint that was read already."""
    network = build(checkpoint["network"])
    assert isinstance(network, LanguageModel)
    weights = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(PREFIX)
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {path}: weights do not fit its network: {reason}") from error
    return network.eval()


def check_same_network(path: str | Path, network: LanguageModel) -> None:
    """Raises a ValueError that names the settings in which a checkpoint's network differs from this one."""
    there, here = (flatten(d) for d in (read_description(path), describe(network)))
    if different := [key for key in {**there, **here} if there.get(key) != here.get(key)]:
        values = "; ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in different)
        raise ValueError(f"checkpoint {path} is of another model: {values}")


def read_description(path: str | Path) -> dict[str, Any]:
    """The description of a checkpoint's network, without reading the shards of a folder."""
    return (read_content(Path(path)) if Path(path).is_dir() else read_checkpoint(path))["network"]


def flatten(description: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a description by their dotted names."""
    flat = {f"{prefix}class": description["class_path"].rpartition(".")[2]}
    for name, value in description["init_args"].items():
        if isinstance(value, dict) and "class_path" in value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def save_network(network: LanguageModel, path: str | Path, content: dict[str, Any] | None = None) -> None:
    """Writes a network as a checkpoint that `load_network` reads; replaces the file in one step.

    Args:
        network: what to write.
        path: file to write or replace.
        content: plain values to add, as the description of a tokenizer.
    """
    checkpoint = {
        **(content or {}),
        "network": describe(network),
        "state_dict": {PREFIX + name: tensor for name, tensor in network.state_dict().items()},
    }
    temporary = Path(f"{path}.tmp")
    torch.save(checkpoint, temporary)
    temporary.replace(path)
