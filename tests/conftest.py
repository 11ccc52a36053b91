"""Shared fixtures: deterministic seeds, and torch.empty that returns NaN so that an unwritten output fails."""

import os
import signal
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

from tests import shapes

# Before any test imports what is checked.
shapes.install()

if "PYTEST_XDIST_WORKER" in os.environ:
    # One test process per core: more threads than cores would wait for each other at every barrier.
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs with Ctrl-C ignored, and every process of a test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Names a case after its argument where the value is bytes: those of an archive hold the time it was made,
    and the workers of one run would collect different tests."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def seed_everything() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restore_environment() -> Iterator[None]:
    """Undoes what a strategy writes into the environment: a later run would take it for its launcher's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Iterator[None]:
    """The same for what a fixture of several tests has trained, which is set up before any fixture of one test."""
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Within the test, calls go to the functions themselves: for what torch.compile traces, and for shapes that are wrong on purpose."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the test, freshly allocated floating-point memory holds NaN instead of whatever was there."""

    def poison(allocate):
        def allocate_nan(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return allocate_nan

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))
