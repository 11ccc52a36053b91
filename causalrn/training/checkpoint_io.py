"""Writes checkpoints, single files in the background: complete under their name, or absent."""

import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

# A checkpoint has this suffix until it is complete, so that its name is not *.ckpt.
PARTIAL = ".partial"
# The name of a checkpoint begins with this where the same command, started again, continues from it.
PREEMPTED = "preempted-"
# A file in a checkpoint that is a folder: the size of each of the other files.
SIZES = "sizes.json"


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Copies a checkpoint into host memory, lets training go on, and writes the copy in a thread.

    One checkpoint is written at a time: a second one waits for the first. A file that must make room for a new
    one is removed after the new one is on disk, and kept where that failed. A failed write is a warning, since the
    next one may find room again; `teardown` raises it if it was the last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.executor: ThreadPoolExecutor | None = None
        self.writing: Future[None] | None = None
        self.failure: OSError | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        assert storage_options is None, "there are none"
        self.wait()
        if self.failure is not None:
            warnings.warn(f"{self.failure}; training goes on", stacklevel=2)
        # A folder that cannot be made is refused here, before the copy is paid for, not by the thread.
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.executor = self.executor or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing = self.executor.submit(self.write, snapshot(checkpoint), Path(path))

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Runs in the thread; leaves a failure for the training process to tell."""
        try:
            write_file(checkpoint, path)
            self.failure = None
        except OSError as error:
            self.failure = error

    def remove_checkpoint(self, path: str | Path) -> None:
        if self.executor is None:
            super().remove_checkpoint(path)
        else:
            self.executor.submit(self.remove_unless_failed, path)

    def remove_unless_failed(self, path: str | Path) -> None:
        if self.failure is None:
            super().remove_checkpoint(path)

    def wait(self) -> None:
        """Returns when nothing is being written."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def teardown(self) -> None:
        """Waits for everything under way.

        Raises:
            OSError: the last write failed.
        """
        executor, self.executor = self.executor, None
        if executor is not None:
            executor.shutdown(wait=True)
        self.wait()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure


def write_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint file beside its place, and moves it there once it is on disk.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    temporary = partial_name(path)
    try:
        torch.save(checkpoint, temporary)
        commit(temporary, path, not has_weights_alone(checkpoint))
    # torch reports a full disk as a RuntimeError.
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"checkpoint {path} was not written ({free:,} bytes are free): {reason}") from error


def snapshot(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint with every tensor copied into host memory; tensors that were one stay one."""
    copies: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        key = (*place, tensor.dtype) if tensor.numel() else id(tensor)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return apply_to_collection(checkpoint, Tensor, copy)


def partial_name(path: Path) -> Path:
    """Where a checkpoint is written before it is complete; no reader looks there."""
    return path.with_name(f"{path.name}{PARTIAL}")


def commit(temporary: Path, path: Path, resumable: bool = True) -> None:
    """Gives a written file or folder its name once all of it is on disk, and names it `last.ckpt` too.

    What a preempted run left beside it is older then, and goes. Weights alone, from which no run can go on, get
    their name and take nothing's place.
    """
    if temporary.is_dir():
        sizes = {str(file.relative_to(temporary)): file.stat().st_size for file in files_of(temporary)}
        (temporary / SIZES).write_text(json.dumps(sizes))
    for file in files_of(temporary):
        sync(file)
    make_room(path, for_folder=temporary.is_dir())
    os.replace(temporary, path)
    link = path.with_name("last.ckpt")
    if path != link and resumable:
        new = partial_name(link)
        new.unlink(missing_ok=True)
        new.symlink_to(path.name)
        make_room(link)
        os.replace(new, link)
    sync(path.parent)
    if not resumable:
        return
    for old in path.parent.glob(f"{PREEMPTED}*.ckpt"):
        if old != path:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)


def make_room(path: Path, for_folder: bool = False) -> None:
    """Removes a folder, which a rename cannot replace, or a link whose place a folder takes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif for_folder:
        path.unlink(missing_ok=True)


def has_weights_alone(checkpoint: dict[str, Any]) -> bool:
    """Whether training saved it without the state of its optimizer, as `ModelCheckpoint(save_weights_only=True)` does."""
    return "global_step" in checkpoint and "optimizer_states" not in checkpoint


def files_of(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_sizes(path: Path) -> None:
    """Raises a ValueError where a file of a checkpoint that is a folder is missing or cut short."""
    sizes = json.loads((path / SIZES).read_text()) if (path / SIZES).is_file() else {}
    for name, size in sizes.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise ValueError(f"{name} is missing or cut short")
