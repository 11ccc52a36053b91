"""What the user is told when a corpus or an installation cannot be used."""

import importlib
from types import ModuleType


class DocumentError(ValueError):
    """Input that cannot be used; the message names the file and the place in it."""


class TokenizerError(DocumentError):
    """A tokenizer that does not give text back as it was; the message shows where."""


def optional_module(name: str, needed_for: str) -> ModuleType:
    """A module of the optional `data` extra.

    Raises:
        DocumentError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DocumentError(f"{needed_for} needs {name}: pip install 'causalrn[data]'") from None
