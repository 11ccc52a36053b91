"""The random state of every rank as plain values, so that a checkpoint can hold it."""

import io
import random
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

RandomState = dict[str, Any]


def random_state() -> RandomState:
    """The state of the generators of Python, NumPy, PyTorch and this process's CUDA device."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.array(keys)), position, has_gauss, float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def gather_random_states(group: dist.ProcessGroup | None) -> list[RandomState]:
    """The states of all ranks; every rank must call it. Without a group, the state of this process."""
    if group is None:
        return [random_state()]
    # They travel as bytes of torch.save: torch 2.13 cannot read back a pickled tensor of bytes.
    file = io.BytesIO()
    torch.save(random_state(), file)
    states: list[Any] = [None] * group.size()
    dist.all_gather_object(states, file.getvalue(), group=group)
    return [torch.load(io.BytesIO(state), weights_only=True) for state in states]


def restore_random_state(states: list[RandomState], rank: int) -> None:
    """Puts back this rank's state; on another number of ranks than saved it, warns and leaves the states as they are."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if len(states) != ranks:
        if rank == 0:
            warnings.warn(
                f"the checkpoint holds the random states of {len(states)} ranks and this run has {ranks}: "
                "whatever draws random numbers within a step draws others from here on",
                stacklevel=2,
            )
        return
    state = states[rank]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
