"""The data of a checkpoint, whose config names folders relative to the one that its run was started in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning import LightningDataModule

from causalrn.training.config_files import read_config
from causalrn.training.former import upgraded

# A checkpoint's key for the absolute path of that folder.
STARTED_IN = "started_in"
# Arguments of DataModules that name folders.
FOLDERS = ("shards_dir", "cache_dir")


def placed_folders(settings: Mapping[str, Any], started_in: str | None) -> dict[str, str]:
    """The folders among a DataModule's settings that lie where the run was started, and not here, as absolute paths.

    A relative folder that is here is taken as it is: data that moved together with the run are found where they are now.
    """
    found = {}
    for name in FOLDERS:
        folder = settings.get(name)
        if not isinstance(folder, str) or started_in is None or Path(folder).exists():
            continue
        if (there := Path(started_in, folder)).exists():
            found[name] = str(there)
    return found


def check_shards(settings: Mapping[str, Any], started_in: str | None, checkpoint: Path) -> None:
    """Raises a ValueError that names every place where a checkpoint's shards could be and are not."""
    folder = settings.get("shards_dir")
    # A corpus of the package is prepared where it is missing, and shards behind an address are fetched.
    if not isinstance(folder, str) or settings.get("corpus") or Path(folder).exists():
        return
    if folder.startswith("pipe:") or "://" in folder:
        return
    places = [Path.cwd()] if started_in is None else [Path.cwd(), Path(started_in)]
    tried = " or ".join(str(place / folder) for place in dict.fromkeys(places))
    raise ValueError(
        f"the shards of checkpoint {checkpoint} are not in {tried}; want the folder that {folder} is relative to as "
        "working folder, or --data CONFIG with a data section that names them"
    )


def data_of(
    checkpoint: dict[str, Any], path: Path, config: Path | None, settings: Mapping[str, Any] | None = None
) -> LightningDataModule:
    """The DataModule that a checkpoint was trained on, or that of the data section of another config.

    Args:
        checkpoint: its content.
        path: where it was read from, for messages.
        config: file whose data section is taken instead.
        settings: arguments of the DataModule to change; those that are None stay.

    Raises:
        ValueError: neither names data, or the checkpoint's shards are not where it names them.
    """
    content = upgraded(read_config(config)) if config else checkpoint.get("config", {})
    if not isinstance(content, dict) or "data" not in content:
        origin = config or f"checkpoint {path}"
        raise ValueError(f"{origin} names no data; want --data CONFIG with a data section")
    data = dict(content["data"])
    arguments = dict(data.get("init_args", {}))
    if not config:
        started_in = checkpoint.get(STARTED_IN)
        arguments |= placed_folders(arguments, started_in)
        check_shards(arguments, started_in, path)
    arguments |= {name: value for name, value in (settings or {}).items() if value is not None}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    described = parser.parse_object({"data": {**data, "init_args": arguments}})
    return parser.instantiate_classes(described)["data"]
