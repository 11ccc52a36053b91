"""Fills in what a config leaves out because another part of it says so already: the vocabulary, the length, the widths."""

from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace

from causalrn.training.checkpoint import named_checkpoint, read_description


def fill_in(config: Namespace, make_data: Callable[[], Any]) -> None:
    """Completes the network of a parsed config in place; what the config states stays as it is.

    The vocabulary, and the length of learned positions, are those of the data, or of the checkpoint that gives a new run
    its weights. An MLP and a short convolution have the width of the mixer.

    Args:
        config: a config of `causalrn.fit` with its defaults.
        make_data: makes the config's DataModule; called only where the data are asked.

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint of this name to begin from.
    """
    network = config.get("model.init_args.network.init_args")
    if network is None or "mixer" not in network:
        return
    mixers = network.mixer if isinstance(network.mixer, list) else [network.mixer]
    for part in (network.get("mlp"), network.get("short_convolution")):
        # A part without a width, as a shift of tokens, takes any.
        settings = part.get("init_args", {}) if part is not None else {}
        if "d_model" in settings and settings["d_model"] is None:
            settings["d_model"] = mixers[0].init_args.d_model
    missing = [] if network.get("vocab_size") is not None else ["vocab_size"]
    if network.get("max_length") is None and network.get("positions") is None:
        missing.append("max_length")
    if missing:
        weights = config.get("init_from")
        known = (
            read_description(named_checkpoint(weights))["init_args"] if weights else values_of(make_data())
        )
        for name in missing:
            network[name] = known.get(name)


def values_of(data: Any) -> dict[str, Any]:
    """What a DataModule says of the network that reads it."""
    return {name: getattr(data, name, None) for name in ("vocab_size", "max_length")}
