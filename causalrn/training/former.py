"""Names of former versions in configs, checkpoints and run folders, and what they are called now."""

import re
from typing import Any

# A class path that begins with a name on the left begins with the one on the right today.
FORMER_NAMES = {
    # Their metrics are the data's now.
    "causalrn.lit_module.CopyModule": "causalrn.training.LanguageModelModule",
    "causalrn.lit_module.TextModule": "causalrn.training.LanguageModelModule",
    "causalrn.lit_module": "causalrn.training",
    "causalrn.callbacks": "causalrn.training.callbacks",
    "causalrn.strategies": "causalrn.training.strategies",
    "causalrn.trackers": "causalrn.training.trackers",
    "causalrn.loggers": "causalrn.training.loggers",
    "datamodules.copying": "datamodules.tasks.copying",
    "datamodules.passkey": "datamodules.tasks.passkey",
    "datamodules.recall": "datamodules.tasks.recall",
    "datamodules.string_tasks": "datamodules.tasks.string_tasks",
    "datamodules.tasks.TaskDataModule": "datamodules.tasks.module.TaskDataModule",
}
_FORMER = re.compile(rf"(?:{'|'.join(map(re.escape, FORMER_NAMES))})(?=\.|$)")


def current_name(path: str) -> str:
    """The present path of a class."""
    return _FORMER.sub(lambda found: FORMER_NAMES[found[0]], path, count=1) if _FORMER.match(path) else path


def upgraded(config: Any) -> Any:
    """A config as plain data, with every class by its present path."""
    if isinstance(config, dict):
        return {key: upgraded(value) for key, value in config.items()}
    if isinstance(config, list):
        return [upgraded(value) for value in config]
    return current_name(config) if isinstance(config, str) else config


def upgraded_arguments(arguments: list[str]) -> list[str]:
    """A command line with every class by its present path, also after an equals sign."""
    return [
        flag + equals + current_name(value) if equals else current_name(argument)
        for argument in arguments
        for flag, equals, value in [argument.partition("=") if argument.startswith("--") else ("", "", "")]
    ]


def former_tokenizer(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What the token ids of a checkpoint without the field `tokenizer` stand for.

    It was described by the position in the data. The official code's weights came without data; its two tasks have
    vocabularies of their own.
    """
    vocab_size = checkpoint["network"]["init_args"]["vocab_size"]
    for state in checkpoint.values():
        if isinstance(state, dict) and isinstance(state.get("tokenizer"), dict):
            return state["tokenizer"]
        if isinstance(state, dict) and state.get("task") == "copy" and state["alphabet_size"] <= 26:
            return {"kind": "letters", "alphabet_size": state["alphabet_size"]}
    if "config" not in checkpoint and vocab_size == 256:
        return {"kind": "bytes"}
    if "config" not in checkpoint and vocab_size == 29:
        return {"kind": "letters", "alphabet_size": 26}
    return {"kind": "numbers", "vocab_size": vocab_size}
