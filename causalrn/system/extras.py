"""Optional packages: imported where they are needed, with one line that says how to get them."""

import importlib
from types import ModuleType


def optional_module(name: str, extra: str, purpose: str) -> ModuleType:
    """The module `name`.

    Raises:
        ValueError: it is not installed; the message names the extra of this package that brings it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise ValueError(f"{purpose} needs the package {name}: pip install 'causalrn[{extra}]'") from None
