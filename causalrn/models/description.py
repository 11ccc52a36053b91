"""A network as plain data and back: the form in which a checkpoint keeps what it needs to rebuild itself."""

import importlib
import inspect
from typing import Any

from torch import nn


def describe(module: nn.Module) -> dict[str, Any]:
    """{"class_path": ..., "init_args": {...}} with plain values only, nested for modules.

    Every constructor argument must be readable as an attribute of the same name.
    """
    init_args = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        # A class without a constructor has that of nn.Module, which takes anything and uses nothing.
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, name)
        init_args[name] = describe(value) if isinstance(value, nn.Module) else value
    return {"class_path": f"{type(module).__module__}.{type(module).__qualname__}", "init_args": init_args}


def build(description: dict[str, Any]) -> nn.Module:
    """The network that `describe` described, with fresh initial values.

    Raises:
        ValueError: the description names no network class, or arguments it does not take.
    """
    class_path = description.get("class_path", "")
    module_name, _, class_name = class_path.rpartition(".")
    try:
        network_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path {class_path!r} cannot be imported: {error}") from error
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise ValueError(f"class_path {class_path!r} is no network; want a torch.nn.Module")
    init_args = {
        name: build(value) if isinstance(value, dict) and "class_path" in value else value
        for name, value in description.get("init_args", {}).items()
    }
    try:
        return network_class(**init_args)
    except TypeError as error:
        raise ValueError(f"{class_path}: {error}") from error
