"""Errors of a corpus or an installation that cannot be used, and the words they use."""

import importlib
from types import ModuleType

# Characters of a text that a message shows.
SHOWN_CHARACTERS = 24


class DocumentError(ValueError):
    """Input that cannot be used; the message names the file and the place in it."""


class ShardError(ValueError):
    """A shard or a manifest that is missing, damaged or of another corpus; the message names the file."""


class TokenizerError(DocumentError):
    """A tokenizer that does not give text back as it was; the message shows where."""


def difference(text: str, found: str) -> str:
    """Both texts around the first character at which they differ, for a message."""
    pairs = enumerate(zip(text, found, strict=False))
    # One of them may be the beginning of the other.
    place = next((index for index, (one, other) in pairs if one != other), min(len(text), len(found)))
    start = max(0, place - SHOWN_CHARACTERS // 2)
    return f"{text[start : start + SHOWN_CHARACTERS]!r} became {found[start : start + SHOWN_CHARACTERS]!r}"


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
