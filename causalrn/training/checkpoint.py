"""Reading and writing self-describing checkpoints: the network is rebuilt from the file alone."""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any, TypedDict

import torch

from causalrn.models import LanguageModel, build, describe, upgrade
from causalrn.system import replacing
from causalrn.training.consolidate import FSDP_META, ZERO_TAG, is_sharded, read_content, read_sharded
from causalrn.training.former import former_tokenizer, upgraded

# A LightningModule holds the network under this name.
PREFIX = "network."
# What a checkpoint is called until it is complete: no *.ckpt.
PARTIAL = ".partial"
# Begins the name of a checkpoint that the same command continues from when it is started again.
PREEMPTED = "preempted-"
# In a checkpoint that is a folder: the size of each of its files.
SIZES = "sizes.json"


class Content(TypedDict, total=False):
    """What a checkpoint holds, whether it is one file or a folder of several ranks; `complete` writes it.

    The first two are in every checkpoint. Those of a training are Lightning's and ours; weights alone, and what
    causalrn.export makes of other programs' weights, lack some of them.
    """

    # The network as `causalrn.models.describe` has it, from which `build` makes it.
    network: dict[str, Any]
    # Weights by their names in the LightningModule: `network.` and the name in the network.
    state_dict: dict[str, torch.Tensor]
    # What token ids stand for: a tokenizer's description, or {"kind": "letters" or "numbers", ...} of a task.
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
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint {path} is truncated or no checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"network", "state_dict"} <= checkpoint.keys():
        raise ValueError(
            f"checkpoint {path} is of another program: want one with the keys network and state_dict"
        )
    return upgraded_checkpoint(checkpoint)


def upgraded_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a former version wrote, in the present form."""
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
    there, here = (flatten(d) for d in (read_description(path), describe(network)))
    if different := [key for key in {**there, **here} if there.get(key) != here.get(key)]:
        values = "; ".join(f"{key} was {there.get(key)!r} and is {here.get(key)!r}" for key in different)
        raise ValueError(f"checkpoint {path} is of another model: {values}")


def read_description(path: str | Path) -> dict[str, Any]:
    """The description of a checkpoint's network, without reading the shards of a folder."""
    return upgrade(read_head(Path(path))["network"])


def read_head(path: Path) -> dict[str, Any]:
    """A checkpoint's content, of a folder without its shards."""
    return upgraded_checkpoint(read_content(path)) if path.is_dir() else read_checkpoint(path)


def read_training(path: Path) -> dict[str, Any]:
    """What training added to a checkpoint, as `read_head`.

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


def flatten(description: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a description by their dotted names."""
    flat = {f"{prefix}class": description["class_path"].rpartition(".")[2]}
    for name, value in description["init_args"].items():
        entries = dict(enumerate(value)) if isinstance(value, list) else {}
        if isinstance(value, dict) and "class_path" in value:
            flat |= flatten(value, f"{prefix}{name}.")
        elif any(isinstance(entry, dict) for entry in entries.values()):
            for number, entry in entries.items():
                flat |= flatten(entry, f"{prefix}{name}.{number}.")
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
    with replacing(Path(path)) as temporary:
        torch.save(checkpoint, temporary)


def partial_name(path: Path) -> Path:
    """Where a checkpoint is written before it is complete; no reader looks there."""
    return path.with_name(f"{path.name}{PARTIAL}")


def commit(temporary: Path, path: Path, resumable: bool = True) -> None:
    """Gives a written file or folder its name once all of it is on disk, and names it `last.ckpt` too.

    What a preempted run left beside it is older then, and goes. Weights alone, from which no run can go on, get
    their name and take nothing's place.
    """
    if temporary.is_dir():
        sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in files_of(temporary)}
        (temporary / SIZES).write_text(json.dumps(sizes))
    for file in files_of(temporary):
        sync(file)
    make_room(path, for_folder=temporary.is_dir())
    os.replace(temporary, path)
    link = path.with_name("last.ckpt")
    if path != link and resumable:
        new = partial_name(link)
        new.unlink(missing_ok=True)
        new.symlink_to(path.name)
        make_room(link)
        os.replace(new, link)
    sync(path.parent)
    if not resumable:
        return
    for old in path.parent.glob(f"{PREEMPTED}*.ckpt"):
        if old != path:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)


def make_room(path: Path, for_folder: bool = False) -> None:
    """Removes what a rename cannot replace: a folder, or where a folder takes its place, a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif for_folder:
        path.unlink(missing_ok=True)


def has_weights_alone(checkpoint: dict[str, Any]) -> bool:
    """Whether training saved it without the state of its optimizer, as `ModelCheckpoint(save_weights_only=True)` does."""
    return "global_step" in checkpoint and "optimizer_states" not in checkpoint


def files_of(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def check_sizes(path: Path) -> None:
    """Raises a ValueError where a file of a checkpoint that is a folder is missing or cut short."""
    sizes = json.loads((path / SIZES).read_text()) if (path / SIZES).is_file() else {}
    for name, size in sizes.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise ValueError(f"{name} is missing or cut short")
