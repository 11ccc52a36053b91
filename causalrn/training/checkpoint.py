"""Reading and writing self-describing checkpoints: the network is rebuilt from the file alone."""

import warnings
from pathlib import Path
from typing import Any, TypedDict

import torch

from causalrn.models import LanguageModel, build, describe, upgrade
from causalrn.system import flatten, replacing
from causalrn.training.checkpoint_io import check_sizes, has_weights_alone
from causalrn.training.consolidate import FSDP_META, ZERO_TAG, is_sharded, load, read_content, read_sharded
from causalrn.training.former import former_tokenizer, upgraded

# A LightningModule holds the network under this name.
PREFIX = "network."


class Content(TypedDict, total=False):
    """The schema of checkpoints, whether one is a file or a folder of several ranks; `complete` writes it.

    The first two are in every checkpoint. Those of a training are Lightning's and ours; weights alone, and what
    causalrn.export makes of other programs' weights, lack some of them.
    """

    # The network as `causalrn.models.describe` has it, from which `build` makes it.
    network: dict[str, Any]
    # Weights by their names in the LightningModule: `network.` and the name in the network.
    state_dict: dict[str, torch.Tensor]
    # The meaning of token ids: a tokenizer's description, or {"kind": "letters" or "numbers", ...} of a task.
    tokenizer: dict[str, Any]
    # The resolved config of the run, and the folder that its relative paths are relative to.
    config: dict[str, Any]
    started_in: str
    # Lightning's own: where training is, and what its parts remember.
    global_step: int
    epoch: int
    loops: dict[str, Any]
    callbacks: dict[str, Any]
    optimizer_states: list[dict[str, Any]]
    lr_schedulers: list[dict[str, Any]]
    # The random states of all ranks, and whether a validation is due at this step.
    preemption: dict[str, Any]
    # The position in the data stands under the name of the DataModule's class, as Lightning puts it there.


def complete(content: dict[str, Any], module: Any) -> None:
    """Adds to what Lightning saves all that makes a checkpoint explain itself. Every rank must call this.

    Args:
        content: what Lightning saves.
        module: the LanguageModelModule; callbacks of its Trainer add what their method `checkpoint_content` returns.
    """
    trainer = module.trainer
    content["network"] = module.description or describe(module.network)
    if (data := getattr(trainer, "datamodule", None)) is not None and hasattr(data, "describe_tokenizer"):
        content["tokenizer"] = data.describe_tokenizer()
    for callback in trainer.callbacks:
        if hasattr(callback, "checkpoint_content"):
            content |= callback.checkpoint_content(weights_only="optimizer_states" not in content)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint's plain content: `network` (its description), `state_dict`, and what training added.

    A folder that several ranks wrote (ZeRO, FSDP) is put together in memory; of a run folder the newest one is read.

    Raises:
        FileNotFoundError: no such file, or a run folder without a checkpoint.
        ValueError: the file is truncated, or was not written by this project.
    """
    path = named_checkpoint(path)
    if path.is_dir():
        return upgraded_checkpoint(read_sharded(path))
    checkpoint = load(path)
    if not isinstance(checkpoint, dict) or not {"network", "state_dict"} <= checkpoint.keys():
        raise ValueError(
            f"checkpoint {path} is of another program: want one with the keys network and state_dict"
        )
    return upgraded_checkpoint(checkpoint)


def upgraded_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Brings the content that a former version wrote to the present form."""
    if "config" in checkpoint:
        checkpoint["config"] = upgraded(checkpoint["config"])
    checkpoint.setdefault("tokenizer", former_tokenizer(checkpoint))
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
    there, here = (settings_of(description) for description in (read_description(path), describe(network)))
    if different := [key for key in {**there, **here} if there.get(key) != here.get(key)]:
        values = "; ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in different)
        raise ValueError(f"checkpoint {path} is of another model: {values}")


def settings_of(description: dict[str, Any]) -> dict[str, Any]:
    """The settings of a description by their dotted names, with the class of each part."""
    settings = {}
    for key, value in flatten(description).items():
        name = key.replace("init_args.", "").replace("class_path", "class")
        settings[name] = value.rpartition(".")[2] if key.endswith("class_path") else value
    return settings


def read_description(path: str | Path) -> dict[str, Any]:
    """The description of a checkpoint's network, without reading the shards of a folder."""
    return upgrade(read_head(Path(path))["network"])


def read_head(path: Path) -> dict[str, Any]:
    """A checkpoint's content, of a folder without its shards."""
    return upgraded_checkpoint(read_content(path)) if path.is_dir() else read_checkpoint(path)


def read_training(path: Path) -> dict[str, Any]:
    """The content of `read_head`, where a training can continue from it.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`; also a checkpoint that no training can continue from.
    """
    content = read_head(path)
    if not {"global_step", "loops"} <= content.keys() or (path.is_file() and has_weights_alone(content)):
        raise ValueError(
            f"checkpoint {path} holds weights alone, and no state of a training to continue; want --init_from {path}"
        )
    return content


def progress(path: Path) -> tuple[int, bool]:
    """How far a checkpoint has come: its step, and whether the validation due at that step is done.

    Raises:
        FileNotFoundError, ValueError: see `read_training`.
    """
    content = read_training(path)
    return content["global_step"], not content.get("preemption", {}).get("validation_is_due", False)


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
    with replacing(Path(path)) as temporary:
        torch.save(checkpoint, temporary)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of a folder that is furthest on; warns of those that are not complete.

    File times tell nothing once a folder was copied: they decide between equal steps only.
    """
    found: list[tuple[tuple[int, bool], float, Path]] = []
    for path in folder.glob("*.ckpt"):
        if path.is_symlink():
            continue
        try:
            check_sizes(path)
            found.append((progress(path), path.stat().st_mtime, path))
        except ValueError as error:
            warnings.warn(f"checkpoint {path} is passed over: {error}", stacklevel=2)
    return max(found)[-1] if found else None


def named_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path names: a file or a sharded folder itself, the newest of a run folder.

    Raises:
        FileNotFoundError: there is nothing, or a folder that holds no complete checkpoint.
    """
    path = Path(path)
    if path.is_file() or is_sharded(path):
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path}: no such file or folder")
    newest = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise FileNotFoundError(
            f"checkpoint {path} is a folder without {ZERO_TAG}/ (ZeRO) or {FSDP_META} (FSDP), and without a complete "
            "checkpoint in checkpoints/ (a run)"
        )
    return newest
