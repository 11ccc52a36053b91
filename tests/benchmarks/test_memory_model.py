"""The formulas of memory and traffic: their tables in the docs, the model's own sizes, and a measured run."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import benchmarks.__main__ as bench
from benchmarks import memory_model
from benchmarks.memory_model import STRATEGIES, Shape, activation_bytes, state_bytes, tables
from causalrn.models import LanguageModel, LinearRelation, QuadraticRelation
from tests import ROOT

SMALL = Shape(d_model=64, d_hidden=256, n_layers=2, vocab_size=100, context=50)


def make_network(mixer: type[LinearRelation] | type[QuadraticRelation]) -> LanguageModel:
    return LanguageModel(mixer(64, 256), vocab_size=100, n_layers=2, max_length=50)


def test_the_docs_show_what_the_code_prints() -> None:
    assert tables() in (ROOT / "docs" / "scaling.md").read_text(), "python -m benchmarks.memory_model"


def test_parameters_are_those_of_the_model() -> None:
    network = make_network(LinearRelation)
    assert SMALL.parameters == sum(parameter.numel() for parameter in network.parameters())
    for form, mixer in (("linear", LinearRelation), ("quadratic", QuadraticRelation)):
        network = make_network(mixer)
        assert memory_model.pool_bytes(SMALL, form) == network.cache_bytes(50, torch.bfloat16)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("mixer", [LinearRelation, QuadraticRelation])
def test_activations_are_what_the_backward_pass_keeps(mixer: type[LinearRelation], mixed: bool) -> None:
    network = make_network(mixer)
    tokens = torch.randint(100, (3, 50))
    known = {x.untyped_storage().data_ptr() for x in (tokens, *network.parameters())}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        # A bfloat16 copy of a weight belongs to the strategy's bytes.
        if x.untyped_storage().data_ptr() not in known and x.numel() >= 3 * 50 * 64:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        F.cross_entropy(network(tokens).flatten(0, 1), tokens.flatten())
    measured = sum(
        x.untyped_storage().nbytes() for x in kept.values() if x.shape[0] != 256 and x.shape != (64, 256)
    )
    # What is computed with at once is not kept, but for the log-probabilities.
    work = max(8 * 100 + 2 * 100 * mixed, 24 * 256) - 4 * 100
    assert measured == pytest.approx(activation_bytes(SMALL, 150, mixed) - 150 * work, rel=0.02)


def test_sharding_divides() -> None:
    one, *shards = (state_bytes(SMALL, name, 4, mixed=False) for name in STRATEGIES)
    assert one.device == 16 * SMALL.parameters
    for name, shard in zip(STRATEGIES[1:], shards, strict=True):
        divided = 4 if name in ("fsdp", "zero2", "zero3") else 1
        assert shard.gradients == (0 if "offload" in name else 4 * SMALL.parameters / divided)
        assert memory_model.traffic_bytes(SMALL, name, 4, False, 2) >= memory_model.traffic_bytes(
            SMALL, name, 4, False
        )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux")
def test_a_run_needs_what_the_formulas_say(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["memory", "--strategies", "one", "--forms", "linear", "--layers", "4", "--batch-size", "4"])
    *lines, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    (row,) = record["rows"]
    assert lines[0].startswith("one ")
    assert row["measured_over_predicted"] == pytest.approx(1, abs=0.3)
