"""Checks every point of a sweep before anything starts, and counts what it trains on."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import Namespace

from causalrn.cli import CLI
from causalrn.sweeps.grid import Sweep
from causalrn.system import flatten
from causalrn.training.errors import USER_ERRORS, one_line
from causalrn.training.module import LanguageModelModule, check_fits, logged_names
from causalrn.training.trainer_settings import check_settings

# These belong to one run of a point, not to the point.
OF_A_RUN = ("run_dir", "resume", "config")


@dataclass(frozen=True)
class Plan:
    """A point as it would run.

    Args:
        settings: every value of its resolved config, by dotted key.
        steps: optimizer steps.
        sequences: per step.
        positions: per sequence.
        parameters: of the network.
        metrics: names that it will log at validation.
    """

    settings: dict[str, Any]
    steps: int
    sequences: int
    positions: int
    parameters: int
    metrics: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return self.steps * self.sequences * self.positions


def plan_points(sweep: Sweep) -> list[Plan]:
    """Parses every point as its run would, and builds its network without memory.

    Raises:
        ValueError: naming the first point that cannot run, and why; or a goal that no point logs.
    """
    plans = []
    parser = None
    for point in sweep.points:
        # The parser prints its own report of a mistake to the terminal.
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                if parser is None:
                    parser = CLI(list(point.arguments)).parser
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
    module, data = build_objects(config, instantiate)
    network = module.network
    settings = {key: value for key, value in config.as_dict().items() if key not in OF_A_RUN}
    plain = {key: as_plain(value) for key, value in flatten(settings).items()}
    check_fits(network, data)
    return Plan(
        settings=plain,
        steps=max(0, config.trainer.max_steps),
        sequences=data.batch_size * config.trainer.accumulate_grad_batches,
        positions=data.max_length,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        metrics=tuple(logged_names(data)),
    )


def as_plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
