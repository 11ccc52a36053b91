"""Fills in what a config leaves out because another part of it says so already: the vocabulary, the length, the widths."""

from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace


def fill_in(config: Namespace, make_data: Callable[[], Any]) -> None:
    """Completes the network of a parsed config in place; what the config states stays as it is.

    The vocabulary, and the length of learned positions, are those of the data. An MLP and a short convolution have the
    width of the mixer.

    Args:
        config: a config of `causalrn.fit` with its defaults.
        make_data: makes the config's DataModule; called only where the data are asked.
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
    learned = network.get("max_length") is None and network.get("positions") is None
    if learned or network.get("vocab_size") is None:
        data = make_data()
        if network.get("vocab_size") is None:
            network["vocab_size"] = getattr(data, "vocab_size", None)
        if learned:
            network["max_length"] = getattr(data, "max_length", None)
