"""A network as plain data and back: the form in which a checkpoint keeps what it needs to rebuild itself."""

import importlib
import inspect
import re
from typing import Any

from torch import nn

# Classes that were mixers around a mixer before a block had a short convolution of its own.
FORMER_STAGES = ("causalrn.models.ShortConvolution", "causalrn.models.TokenShift")


def describe(module: nn.Module) -> dict[str, Any]:
    """{"class_path": ..., "init_args": {...}} with plain values only, nested for modules and lists of them.

    Every constructor argument must be readable as an attribute of the same name.
    """
    init_args = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        # A class without a constructor has that of nn.Module, which takes anything and uses nothing.
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        init_args[name] = as_plain(getattr(module, name))
    class_path = f"{type(module).__module__}.{type(module).__qualname__}"
    return {"class_path": public_path(class_path), "init_args": init_args}


def as_plain(value: Any) -> Any:
    if isinstance(value, list):
        return [as_plain(entry) for entry in value]
    return describe(value) if isinstance(value, nn.Module) else value


def build(description: dict[str, Any]) -> nn.Module:
    """The network that `describe` described, now or in former versions, with fresh initial values.

    Raises:
        ValueError: the description names no network class, or arguments it does not take.
    """
    return make(upgrade(description))


def make(description: dict[str, Any]) -> nn.Module:
    """`build` for a description in today's form."""
    class_path = description.get("class_path", "")
    module_name, _, class_name = class_path.rpartition(".")
    try:
        network_class = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path {class_path!r} cannot be imported: {error}") from error
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise ValueError(f"class_path {class_path!r} is no network; want a torch.nn.Module")
    init_args = {name: from_plain(value) for name, value in description.get("init_args", {}).items()}
    try:
        return network_class(**init_args)
    except TypeError as error:
        raise ValueError(f"{class_path}: {error}") from error


def from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return [from_plain(entry) for entry in value]
    return make(value) if isinstance(value, dict) and "class_path" in value else value


def public_path(class_path: str) -> str:
    """The short path of a network class: the module of `causalrn.models` that holds it may change."""
    return re.sub(r"^causalrn\.models\.\w+\.(\w+)$", r"causalrn.models.\1", class_path)


def upgrade(value: Any) -> Any:
    """A description, or a config that holds some, in today's form; what is in that form already stays as it is.

    A short convolution was a mixer around the network's mixer, of which its width followed.
    """
    if isinstance(value, list):
        return [upgrade(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    value = {key: upgrade(entry) for key, entry in value.items()}
    if isinstance(value.get("class_path"), str):
        value["class_path"] = public_path(value["class_path"])
    stage = former_stage(value)
    if stage is None or value.get("class_path") in FORMER_STAGES:
        return value
    settings = dict(stage["init_args"])
    mixer = settings.pop("mixer")
    if stage["class_path"] == "causalrn.models.ShortConvolution":
        settings = {"d_model": mixer["init_args"]["d_model"], **settings}
    value["init_args"] |= {"mixer": mixer, "short_convolution": {**stage, "init_args": settings}}
    return value


def former_stage(description: dict[str, Any]) -> dict[str, Any] | None:
    """The short convolution that stands as the mixer of a network and holds the mixer itself."""
    settings = description.get("init_args")
    mixer = settings.get("mixer") if isinstance(settings, dict) else None
    if not isinstance(mixer, dict) or mixer.get("class_path") not in FORMER_STAGES:
        return None
    return mixer if isinstance(mixer.get("init_args", {}).get("mixer"), dict) else None
