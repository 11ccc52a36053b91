"""A user's mistake ends a command with one line; the parser's reports are made that short."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from causalrn.training.signals import EXIT_INTERRUPTED

USER_ERRORS = (ValueError, OSError, MisconfigurationException, ArgumentError)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake ends the process with one line and exit code 1; CAUSALRN_TRACEBACK=1 shows all of it."""
    try:
        yield
    except USER_ERRORS as error:
        if os.environ.get("CAUSALRN_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's main function with one-line errors; Ctrl-C ends it with exit code 130."""
    try:
        with one_line_errors():
            main()
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except SystemExit as stop:
        # Lightning's own answer to it is exit code 1.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise SystemExit(EXIT_INTERRUPTED) from None
        raise


def one_line(message: str) -> str:
    """The message on one line; a parser's report becomes the key, the value that it got, and what it wants."""
    # A value was tried as several types; the first that names a class is the one that was meant.
    message = re.sub(
        r"(\n    - Problem with.*?)\n    - .*(?=\n  Given value type)", r"\1", message, flags=re.DOTALL
    )
    keys = re.findall(r'Parser key "([^"]+)":', message)
    # A section that cannot be read is named twice.
    keys = keys[:1] if len(set(keys)) == 1 else keys
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    # The types that the value was tried as follow the key, each with its reason.
    reasons = [
        line
        for line in dict.fromkeys(lines)
        if line and not re.match(r"Parser key|Problem with|Does not val|Subtypes|Errors:|Given value", line)
    ]
    # These say only that the value is of another type; the other reasons tell what is wrong.
    general = r"Expected a|Not a valid subclass|Subclass types expect|a (class path|dict) "
    wrong = [reason for reason in reasons if not re.match(general, reason)]
    if not keys and re.search(r"^\s*Errors:", message, re.MULTILINE) and wrong:
        # A constructor said so, and names itself.
        return wrong[0]
    if re.search(r"required: .*\b(data|model)\b", message):
        return "a run needs `model` and `data`: want --config FILE, as --config configs/copy/quickstart.yaml"
    if not keys or not reasons:
        return " ".join(message.split())
    # A key within a class is one of its arguments.
    key = ".init_args.".join(keys)
    if wrong:
        classes = re.findall(r"Problem with given class_path '(?:[\w.]+\.)?(\w+)'", message)
        return f"{key}: {classes[len(keys) - 1] + ': ' if len(classes) >= len(keys) else ''}{wrong[0]}"
    wanted, got = [], None
    for reason in reasons:
        found = re.fullmatch(r"Expected an? (.+?)(?:\. Got value: (.*))?", reason)
        if found and "NoneType" not in found[1] and not found[1].startswith("path but"):
            wanted.append(plain_type(found[1]))
            got = found[2] or got
    given = re.search(r"Given value: (?:NestedArg\(.*val=(.*)\)|(.*))\s*\Z", message)
    got = got or (given and (given[1] or given[2])) or "something else"
    return f"{key}: got {got}, want {' or '.join(dict.fromkeys(wanted))}"


def plain_type(text: str) -> str:
    """A type as one would say it: `<class 'int'>` is int, `typing.Literal['a', 'b']` is 'a', 'b'."""
    text = re.sub(r"typing\.Literal\[(.*)\]", r"\1", text)
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    return re.sub(r"dot import path string: .*", "the path of a class", text)
