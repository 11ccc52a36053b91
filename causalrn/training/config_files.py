"""Finds the config files that commands and sweeps name: in the working folder, or else among those that ship."""

import difflib
import json
from pathlib import Path
from typing import Any

import yaml

# Public, though the package exports it by a list that is made while it is imported.
from jsonargparse import ActionConfigFile, Namespace  # pyright: ignore[reportPrivateImportUsage]
from lightning.pytorch.cli import LightningArgumentParser

from causalrn.training.config_values import fill_in
from causalrn.training.former import upgraded, upgraded_arguments

# The folder of configs in a checkout; their names may begin with it.
CHECKOUT_FOLDER = "configs"
# The values of these keys are mappings, or name a class; everything else of a config is a plain value.
SECTIONS = ("trainer", "model", "data")


def shipped_configs() -> Path:
    """The folder of the configs that ship: inside the installed package, or beside the package of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / CHECKOUT_FOLDER
    return inside if inside.is_dir() else package.parent / CHECKOUT_FOLDER


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file that a config's name stands for.

    A file that is there under this name is taken as it is. Otherwise the name is looked for among the shipped configs,
    as `mixer/transformer.yaml`, or as `configs/mixer/transformer.yaml`, which it is called in a checkout.

    Args:
        name: as the user gave it.
        beside: folder that a relative name is relative to; the working folder by default.

    Raises:
        FileNotFoundError: there is none; the message names the searched places and configs of similar names.
    """
    path = Path(name) if beside is None else beside / name
    # A pipe is no regular file, and what a shell's <(...) stands for.
    if path.exists() and not path.is_dir():
        return path
    searched = [path.absolute().parent]
    parts = Path(name).parts
    if not Path(name).is_absolute() and ".." not in parts:
        wanted = Path(*parts[1:]) if parts[:1] == (CHECKOUT_FOLDER,) else Path(name)
        if (found := shipped_configs() / wanted).is_file():
            return found
        searched.append(found.parent)
    near = near_names(Path(name), searched[0])
    raise FileNotFoundError(
        f"config {name}: no such file in {' or '.join(map(str, searched))}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def near_names(name: Path, folder: Path) -> list[str]:
    """At most three configs, of `folder` or shipped ones, whose names resemble one that is not there."""
    known = [str(name.with_name(path.name)) for path in sorted(folder.glob("*.yaml"))]
    known += sorted(
        path.relative_to(shipped_configs()).as_posix() for path in shipped_configs().rglob("*.yaml")
    )
    same = [other for other in known if Path(other).stem == name.stem]
    return list(dict.fromkeys([*same, *difflib.get_close_matches(name.as_posix(), known, cutoff=0.8)]))[:3]


class ConfigFile(ActionConfigFile):
    """The argument --config: finds the file as `find_config` does, and names one that is no config.

    YAML text in place of a file's name is taken too, as jsonargparse does.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if not is_mapping(values):
            path = find_config(values)
            values = str(path)
            # The parser's own reports do not name the file. A pipe can be read but once.
            if path.is_file():
                content = read_config(path)
                check_sections(path, content)
                present = upgraded(content)
                # Text is taken in place of a file's name.
                values = values if present == content else yaml.safe_dump(present, sort_keys=False)
        super().__call__(parser, cfg, values, option_string)


def read_config(path: Path, kind: str = "config") -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: it is no YAML; the message names the file as one of this kind.
    """
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{kind} {path} is no YAML: {error}") from error


def check_sections(path: Path, content: Any) -> None:
    """Raises a ValueError for the content of a file that is no mapping, or has something else in the place of a section."""
    if content is None:
        raise ValueError(
            f"config {path} is empty: want at least one of {', '.join(SECTIONS)}, or leave it out"
        )
    if not isinstance(content, dict):
        raise ValueError(f"config {path} is no mapping: got {content!r}, want keys as {', '.join(SECTIONS)}")
    for name in SECTIONS:
        # A class without arguments may be named by its path alone.
        named = isinstance(content.get(name), str) and name != "trainer"
        if name in content and not named and not isinstance(content[name], dict):
            raise ValueError(f"config {path}: {name} must be a mapping: got {content[name]!r}")


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is none, or where a kill has torn it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_mapping(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False


class ConfigParser(LightningArgumentParser):
    """Lightning's parser, whose --config is a `ConfigFile`, and whose result is complete, see `fill_in`."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = ConfigFile
        return super().add_argument(*args, **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        arguments = upgraded_arguments(args) if isinstance(args, list) else args
        config: Any = super().parse_args(arguments, *rest, **kwargs)
        fill_in(config, lambda: self.instantiate_classes(Namespace(data=config.data))["data"])
        return config
