"""Checkpoint folders of several ranks, read as the one checkpoint that they make up: DeepSpeed's ZeRO and FSDP's."""

import math
import pickle
import tempfile
import zipfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

# The tag under which Lightning's DeepSpeed strategy saves, and the file beside FSDP's shards.
ZERO_TAG, FSDP_META = "checkpoint", "meta.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")
# Entries that DeepSpeed adds to the training's own content.
ENGINE_KEYS = (
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config"),
    *("ds_version", "checkpoint_parallel_dimensions", "autoep_layers"),
)


class Opaque:
    """Stands for an object of DeepSpeed's that is not needed: nothing of DeepSpeed is imported or run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


# Unpickled as plain values, so that a folder can be read without deepspeed and without trust in its code.
STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Opaque, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Opaque, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Opaque, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def is_zero_folder(path: Path) -> bool:
    return (path / ZERO_TAG).is_dir()


def is_fsdp_folder(path: Path) -> bool:
    return (path / FSDP_META).is_file()


def is_sharded(path: Path) -> bool:
    return is_zero_folder(path) or is_fsdp_folder(path)


def read_content(path: Path) -> dict[str, Any]:
    """Everything but weights and optimizer: the network's description, the config, the data's position.

    Raises:
        ValueError: see `read_sharded`.
    """
    if is_zero_folder(path):
        return {key: value for key, value in read_model_states(path).items() if key not in ENGINE_KEYS}
    if is_fsdp_folder(path):
        return load(path / FSDP_META)
    raise ValueError(f"checkpoint {path} is a folder without {ZERO_TAG}/ (ZeRO) or {FSDP_META} (FSDP)")


def read_model_states(path: Path) -> dict[str, Any]:
    """The model states that rank 0 of a ZeRO folder wrote."""
    files = sorted((path / ZERO_TAG).glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise ValueError(f"checkpoint {path}: no model states in {ZERO_TAG}/; want a complete ZeRO folder")
    # zero_pp_rank_0 comes first by its name.
    return load(files[0])


def read_sharded(path: Path) -> dict[str, Any]:
    """The whole checkpoint on the CPU, float32 weights, optimizer state in the order of torch's own optimizers.

    Raises:
        ValueError: the folder is incomplete, or none that training here writes.
    """
    content = read_content(path)
    return content | (read_zero(path) if is_zero_folder(path) else read_fsdp(path))


def count_ranks(path: Path) -> tuple[int, int]:
    """The number of ranks that wrote a ZeRO folder, and the stage.

    Raises:
        ValueError: a rank's file is missing.
    """
    files = rank_files(path)
    if not files:
        raise ValueError(
            f"checkpoint {path}: no optimizer states in {ZERO_TAG}/; want a complete ZeRO folder"
        )
    state = load(files[0])["optimizer_state_dict"]
    count = state["partition_count"]
    ranks = max(count) if isinstance(count, list) else count
    if len(files) != ranks:
        raise ValueError(f"checkpoint {path}: {len(files)} of the {ranks} ranks' optimizer states are there")
    return ranks, int(state["zero_stage"])


def read_zero(path: Path) -> dict[str, Any]:
    ranks, stage = count_ranks(path)
    model = read_model_states(path)
    states = [load(file)["optimizer_state_dict"] for file in rank_files(path)]
    base = [state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for state in states]
    shapes = [dict(group) for group in model["param_shapes"]]
    gaps = states[0].get("param_alignment_paddings")

    def merge(parts: list[list[Tensor]]) -> dict[str, Tensor]:
        return merge_whole(parts, shapes) if stage == 3 else merge_flat(parts, shapes, gaps)

    assert len(states) == ranks
    weights = merge(
        [s["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for s in states]
    )
    buffers = {name: model["module"][name] for name in model["buffer_names"] if name in model["module"]}
    checkpoint: dict[str, Any] = {"state_dict": weights | buffers}
    groups = base[0]["param_groups"]
    names = [list(weights)] if len(groups) == 1 else [list(group) for group in shapes]
    saved = [list(rank["state"].values()) for rank in base]
    # Other optimizers keep other things, and stage 3 loses sight of several groups: the weights alone are whole then.
    if len(names) == len(groups) and saved[0] and all(set(MOMENTS) <= group.keys() for group in saved[0]):
        moments = {key: merge([[group[key] for group in rank] for rank in saved]) for key in MOMENTS}
        step = torch.as_tensor(saved[0][0]["step"]).float()
        by_name = {
            name: {"step": step.clone(), **{key: moments[key][name] for key in MOMENTS}} for name in weights
        }
        checkpoint["optimizer_states"] = [optimizer_state(by_name, groups, names)]
    return checkpoint


def rank_files(path: Path) -> list[Path]:
    """The ranks' optimizer states, in the order of the ranks."""
    files = (path / ZERO_TAG).glob("*_optim_states.pt")
    return sorted(files, key=lambda file: int(file.name.split("pp_rank_")[1].split("_")[0]))


def merge_flat(
    parts: list[list[Tensor]], shapes: list[dict[str, torch.Size]], gaps: Any
) -> dict[str, Tensor]:
    """Stages 1 and 2: each group is one vector over all its parameters, cut into equal parts for the ranks."""
    whole = {}
    for index, group in enumerate(shapes):
        flat = torch.cat([rank[index] for rank in parts])
        start = 0
        for position, (name, shape) in enumerate(group.items()):
            whole[name] = flat[start : start + math.prod(shape)].view(shape).clone()
            start += math.prod(shape) + (gaps[index][position] if gaps else 0)
    return whole


def merge_whole(parts: list[list[Tensor]], shapes: list[dict[str, torch.Size]]) -> dict[str, Tensor]:
    """Stage 3: each parameter is cut into equal parts for the ranks, the last one padded."""
    flats = [torch.cat(rank) for rank in parts]
    flat_shapes = {name: shape for group in shapes for name, shape in group.items()}
    sizes = [math.ceil(math.prod(shape) / len(flats)) for shape in flat_shapes.values()]
    starts = [0, *accumulate(sizes)]
    return {
        name: torch.cat([flat[start : start + size] for flat in flats])[: math.prod(shape)].view(shape)
        for (name, shape), start, size in zip(flat_shapes.items(), starts, sizes, strict=False)
    }


def read_fsdp(path: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            dcp_to_torch_save(path, Path(folder, "whole.pt"))
        except (CheckpointException, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            causes = getattr(error, "failures", {})
            reason = next((str(cause) for cause, _ in causes.values()), str(error))
            raise ValueError(f"checkpoint {path} is incomplete: {reason}") from None
        # mmap would outlive the file.
        shards = torch.load(Path(folder, "whole.pt"), map_location="cpu", weights_only=True)
    checkpoint: dict[str, Any] = {"state_dict": shards["state_dict"]}
    if (saved := shards.get("optimizer_0")) and saved.get("state"):
        groups = [group["params"] for group in saved["param_groups"]]
        checkpoint["optimizer_states"] = [optimizer_state(saved["state"], saved["param_groups"], groups)]
    return checkpoint


def optimizer_state(
    by_name: dict[str, Any], param_groups: list[dict[str, Any]], names: list[list[str]]
) -> dict[str, Any]:
    """A state dict as torch.optim writes it: parameters are numbered in their order."""
    numbers = {name: number for number, name in enumerate(name for group in names for name in group)}
    return {
        "state": {number: by_name[name] for name, number in numbers.items()},
        "param_groups": [
            {**settings, "params": [numbers[name] for name in group]}
            for settings, group in zip(param_groups, names, strict=True)
        ],
    }


def load(path: Path) -> Any:
    """The content of a file of torch.save, mapped rather than read.

    Raises:
        ValueError: it is missing, truncated, or holds more than plain values.
    """
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint file {path} is missing") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"checkpoint {path} is truncated or of another program: {reason}") from error
