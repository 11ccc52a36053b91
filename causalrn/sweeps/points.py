"""Checks every point of a sweep before anything starts, and estimates what it costs."""

import contextlib
import io
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace

from causalrn.cli import USER_ERRORS, CausalRNCLI
from causalrn.models import describe
from causalrn.sweeps.grid import Point, Sweep
from causalrn.training.checkpoint import flatten
from causalrn.training.config_errors import one_line
from causalrn.training.module import LanguageModelModule
from causalrn.training.trainer_settings import check_settings

# What belongs to one run of a point, not to the point.
OF_A_RUN = ("run_dir", "resume", "config")


@dataclass(frozen=True)
class Plan:
    """What a point would do.

    Args:
        settings: every value of its resolved config, by dotted key.
        steps: optimizer steps.
        sequences: per step.
        positions: per sequence.
        parameters: of the network.
        network_key: equal for points of equal cost per sequence.
        metrics: names that it will log at validation.
    """

    settings: dict[str, Any]
    steps: int
    sequences: int
    positions: int
    parameters: int
    network_key: str
    metrics: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.steps * self.sequences * self.positions


class PointParser(CausalRNCLI):
    """The parser of `causalrn.fit` and nothing else: neither objects nor a run folder are made."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def plan_points(sweep: Sweep) -> list[Plan]:
    """Parses every point as its run would, and builds its network without memory.

    Raises:
        ValueError: naming the first point that cannot run, and why; or a goal that no point logs.
    """
    plans = []
    parser = None
    for point in sweep.points:
        # Of one process; the parser's own report of a mistake goes to the terminal.
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                if parser is None:
                    parser = PointParser(list(point.arguments)).parser
                config = parser.parse_args(list(point.arguments))
                plans.append(plan_point(config, parser.instantiate_classes))
            except SystemExit:
                raise ValueError(f"point {point.name}: {one_line(said.getvalue())}") from None
            except USER_ERRORS as error:
                raise ValueError(f"point {point.name}: {one_line(str(error))}") from error
    if sweep.goal is not None:
        for point, plan in zip(sweep.points, plans, strict=True):
            if sweep.goal.metric not in plan.metrics:
                raise ValueError(
                    f"goal: point {point.name} has no metric {sweep.goal.metric}; want one of "
                    f"{', '.join(plan.metrics)}"
                )
    return plans


def build_objects(config: Namespace, instantiate: Any) -> tuple[LanguageModelModule, Any]:
    """The module, without memory, and the data of a config.

    Raises:
        ValueError: a setting of theirs or of the Trainer makes no sense.
    """
    check_settings(config.trainer.as_dict())
    part = Namespace(model=config.model, data=config.data)
    with torch.device("meta"):
        objects = instantiate(part)
    assert isinstance(objects.model, LanguageModelModule)
    return objects.model, objects.data


def plan_point(config: Namespace, instantiate: Any) -> Plan:
    settings = flat_settings(config)
    module, data = build_objects(config, instantiate)
    network = module.network
    if data.vocab_size != network.vocab_size:
        raise ValueError(
            f"vocab_size of the model and of the data differ: {network.vocab_size}, {data.vocab_size}"
        )
    if network.max_length is not None and data.max_length > network.max_length:
        raise ValueError(
            f"a row of the data has {data.max_length} positions, and the model max_length={network.max_length}; "
            "set model.init_args.network.init_args.max_length"
        )
    return Plan(
        settings=settings,
        steps=max(0, config.trainer.max_steps),
        sequences=data.batch_size * config.trainer.accumulate_grad_batches,
        positions=data.max_length,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        network_key=f"{sorted(flatten(describe(network)).items(), key=str)}, {data.max_length}",
        metrics=tuple(module.metric_names(data.val_names)),
    )


def flat_settings(config: Namespace) -> dict[str, Any]:
    """Every plain value of a config by its dotted key."""
    plain = {key: value for key, value in config.as_dict().items() if key not in OF_A_RUN}
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            for number, inner in enumerate(value):
                walk(f"{prefix}.{number}", inner)
        elif isinstance(value, str | int | float | bool | None):
            flat[prefix] = value
        else:
            flat[prefix] = str(value)

    walk("", plain)
    return flat


class StepTimer:
    """Seconds per training step of a plan on this machine, from one step of few sequences, timed once per network."""

    def __init__(self, sweep: Sweep, n_sequences: int = 4) -> None:
        self.n_sequences = n_sequences
        self.seconds: dict[str, float] = {}
        self.parser = PointParser(list(sweep.points[0].arguments)).parser
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def step_seconds(self, point: Point, plan: Plan) -> float:
        if plan.network_key not in self.seconds:
            config = self.parser.parse_args(list(point.arguments))
            objects: Any = self.parser.instantiate_classes(Namespace(model=config.model))
            module = objects.model
            self.seconds[plan.network_key] = self.time_step(module.network.to(self.device), plan)
        return self.seconds[plan.network_key] * plan.sequences

    def time_step(self, network: torch.nn.Module, plan: Plan) -> float:
        tokens = torch.zeros(self.n_sequences, plan.positions, dtype=torch.int64, device=self.device)
        best = float("inf")
        # The first one sets things up.
        for _ in range(2):
            start = time.perf_counter()
            network(tokens).logsumexp(-1).mean().backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best / self.n_sequences


def threads_per_job(jobs: int) -> int:
    """This machine's cores, divided over the runs at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)
