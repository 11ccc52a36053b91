"""Finds the data of a checkpoint whose config names them relative to the folder that its run was started in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
