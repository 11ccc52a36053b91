"""Compares a run with the checkpoint that it continues, and loads the weights of one that it begins with."""

from pathlib import Path
from typing import Any

from causalrn.models import LanguageModel
from causalrn.training.checkpoint import PREFIX, check_same_network, read_checkpoint, read_training
from causalrn.training.resume import OF_A_START

LONGEST_VALUE = 80


def check_continues(checkpoint: Path, network: LanguageModel, data: Any, config: dict[str, Any]) -> list[str]:
    """Looks for what a checkpoint would not let take effect; every other setting that differs is a line to print.

    Args:
        checkpoint: what the run continues from.
        network: of this run.
        data: its DataModule.
        config: the resolved config as plain data.

    Raises:
        ValueError: the network, the data, their order or the seed is another one, or the checkpoint holds weights alone.
    """
    content = read_training(checkpoint)
    check_same_network(checkpoint, network)
    before = content.get("config") or {}
    changes = differences(before, config)
    remedy = f"want --init_from {checkpoint} to begin a new run with its weights"
    if before and (change := changes.get("seed_everything")):
        raise ValueError(
            f"seed_everything was {change[0]} and is {change[1]}: checkpoint {checkpoint} holds the state that the "
            f"random numbers go on from; {remedy}"
        )
    name = type(data).__qualname__
    known = (before.get("data") or {}).get("class_path", name).rpartition(".")[2]
    if known != name:
        raise ValueError(
            f"checkpoint {checkpoint} was trained on {known}, and cannot continue on {name}; {remedy}"
        )
    check_data(data, content.get(name), remedy)
    return [f"{key}: {shown(old)} -> {shown(new)}" for key, (old, new) in changes.items()] if before else []


def check_data(data: Any, state: dict[str, Any] | None, remedy: str) -> None:
    """Raises the DataModule's own ValueError before anything is written, where its data are in reach by now."""
    if state is None or not hasattr(data, "check_identity"):
        return
    try:
        data.identity()
    except (ValueError, OSError):
        # They are not downloaded or prepared yet; they are checked when the state is loaded.
        return
    try:
        data.check_identity(state)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The old and the new value of each setting that differs, by dotted key."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **now}:
        if not prefix and key in ("config", "run_dir", *OF_A_START):
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changes[prefix + key] = (old, new)
    return changes


def shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def load_weights(checkpoint: Path, network: LanguageModel) -> None:
    """Gives a network the weights of a checkpoint; every rank does so before a strategy shards them.

    Raises:
        ValueError: the checkpoint is of another network, or broken.
    """
    check_same_network(checkpoint, network)
    weights = read_checkpoint(checkpoint)["state_dict"]
    network.load_state_dict(
        {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    )
