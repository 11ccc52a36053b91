"""The random state of every rank as plain values, so that a checkpoint can hold it."""

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
    # They travel as arrays: torch 2.13 cannot read back a pickled tensor of bytes.
    state = {name: as_array(value) for name, value in random_state().items()}
    states: list[Any] = [None] * group.size()
    dist.all_gather_object(states, state, group=group)
    return [{name: as_tensor(value) for name, value in state.items()} for state in states]


def as_array(value: Any) -> Any:
    if isinstance(value, list):
        return [as_array(item) for item in value]
    return value.numpy() if isinstance(value, torch.Tensor) else value


def as_tensor(value: Any) -> Any:
    if isinstance(value, list):
        return [as_tensor(item) for item in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


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
