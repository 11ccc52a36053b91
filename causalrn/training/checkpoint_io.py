"""Writes checkpoint files in the background: complete under their name, or absent."""

import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from causalrn.training.checkpoint import commit, has_weights_alone, partial_name


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
        # Before the copy is paid for: what can be refused at once must not come from a thread.
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
