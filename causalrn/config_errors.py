"""What is wrong in a config, said in one line: files that are no mapping, and the parser's reports made short."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

# Their values are mappings, or name a class; everything else of a config is a plain value.
SECTIONS = ("trainer", "model", "data")


def check_files(arguments: list[str]) -> None:
    """Looks at the --config files of a command line; the parser's own report would not name the file.

    Raises:
        ValueError: one is no YAML, no mapping, or has something else than a mapping in the place of a section.
    """
    for path in config_files(arguments):
        if not path.is_file():
            # Which the parser says.
            continue
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"config {path} is no YAML: {error}") from error
        if content is None:
            raise ValueError(
                f"config {path} is empty: want at least one of {', '.join(SECTIONS)}, or leave it out"
            )
        if not isinstance(content, dict):
            raise ValueError(
                f"config {path} is no mapping: got {content!r}, want keys as {', '.join(SECTIONS)}"
            )
        for name in SECTIONS:
            if name in content and not is_section(name, content[name]):
                raise ValueError(f"config {path}: {name} must be a mapping: got {content[name]!r}")


def is_section(name: str, content: Any) -> bool:
    return isinstance(content, dict) or (name != "trainer" and isinstance(content, str))


def config_files(arguments: list[str]) -> Iterator[Path]:
    """The files that a command line names, in both forms of the flag."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("-c", "--config"):
            if equals:
                yield Path(value)
            elif index + 1 < len(arguments):
                yield Path(arguments[index + 1])


def one_line(message: str) -> str:
    """The message on one line; of a parser's report the key, what it got and what it wants."""
    # Of the types that a value was tried as, the first that names a class is the one that was meant.
    message = re.sub(
        r"(\n    - Problem with.*?)\n    - .*(?=\n  Given value type)", r"\1", message, flags=re.DOTALL
    )
    keys = re.findall(r'Parser key "([^"]+)":', message)
    # A section that cannot be read is named twice.
    keys = keys[:1] if len(set(keys)) == 1 else keys
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    # After the key come the types that a value was tried as, each with its reason.
    reasons = [
        line
        for line in dict.fromkeys(lines)
        if line and not re.match(r"Parser key|Problem with|Does not val|Subtypes|Errors:|Given value", line)
    ]
    wrong = [reason for reason in reasons if not reason.startswith("Expected a")]
    if not keys and re.search(r"^\s*Errors:", message, re.MULTILINE) and wrong:
        # What a constructor said, which names itself.
        return wrong[0]
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
