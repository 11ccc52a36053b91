"""Names of former versions in configs, checkpoints and run folders, and what they are called now."""

import json
import re
from typing import Any

import yaml

from causalrn.models import upgrade

# The beginning of a class path in former versions, and what stands in its place today.
FORMER_NAMES = {
    # The two classes differed in their metrics, which come from the data now.
    r"causalrn\.lit_module\.\w+$": "causalrn.training.LanguageModelModule",
    r"causalrn\.strategies\.SequenceParallelStrategy$": "causalrn.training.strategies.ContextParallelStrategy",
    r"causalrn\.(callbacks|strategies|trackers|loggers)(?=\.)": r"causalrn.training.\1",
    r"datamodules\.(?:text|copying|recall|tasks)\.(\w+DataModule)$": r"datamodules.\1",
    r"datamodules\.(?:copying|passkey|recall|string_tasks)\.(\w+)$": r"datamodules.tasks.\1",
}
# Tasks whose tokens are letters, as their DataModules name them in a checkpoint.
COPYING = ("copy", "repetitive_copy")


def current_name(path: str) -> str:
    """The present path of a class."""
    for former, name in FORMER_NAMES.items():
        if re.match(former, path):
            return re.sub(former, name, path)
    return path


def upgraded(config: Any) -> Any:
    """A config as plain data in today's form: classes by their present paths, networks by their present arguments."""
    return upgrade(renamed(config))


def renamed(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: renamed(value) for key, value in config.items()}
    if isinstance(config, list):
        return [renamed(value) for value in config]
    return current_name(config) if isinstance(config, str) else config


def upgraded_arguments(arguments: list[str]) -> list[str]:
    """A command line with every class by its present path, also after an equals sign."""
    return [
        flag + equals + renamed_value(value) if equals else renamed_value(argument)
        for argument in arguments
        for flag, equals, value in [argument.partition("=") if argument.startswith("--") else ("", "", "")]
    ]


def renamed_value(value: str) -> str:
    """A value of the command line: a class path, or YAML that names some."""
    if value[:1] not in ("[", "{"):
        return current_name(value)
    try:
        content = yaml.safe_load(value)
    except yaml.YAMLError:
        # The parser says what is wrong with it.
        return value
    present = renamed(content)
    return value if present == content else json.dumps(present)


def former_tokenizer(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Describes the tokens of a checkpoint that was written without the field `tokenizer`.

    It was described by the position in the data. The official code's weights came without data; its two tasks have
    vocabularies of their own.
    """
    vocab_size = checkpoint.get("network", {}).get("init_args", {}).get("vocab_size")
    for state in checkpoint.values():
        if isinstance(state, dict) and isinstance(state.get("tokenizer"), dict):
            return state["tokenizer"]
        if isinstance(state, dict) and state.get("task") in COPYING and state["alphabet_size"] <= 26:
            return {"kind": "letters", "alphabet_size": state["alphabet_size"]}
    if "config" not in checkpoint and vocab_size == 256:
        return {"kind": "bytes"}
    if "config" not in checkpoint and vocab_size == 29:
        return {"kind": "letters", "alphabet_size": 26}
    return {"kind": "numbers", "vocab_size": vocab_size}
