"""The MLPs equal their formulas, and a network with RMS norms and a gated MLP does what every other does."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from causalrn.models import MLP, GatedMLP, LanguageModel, QuadraticRelation, SoftmaxAttention, build, describe
from causalrn.models.cost import forward_cost
from causalrn.models.decoding import GREEDY, generate
from causalrn.ops.reference import normalise


def test_the_papers_mlp_is_its_formula() -> None:
    mlp, x = MLP(8, 12, eps=1e-3), torch.randn(2, 5, 8)
    expected = mlp.fc_2(F.gelu(mlp.fc_1(normalise(x, "layer", 1e-3))))
    assert_close(mlp(x), expected)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_gated_mlp_is_its_formula(norm) -> None:
    mlp, x = GatedMLP(8, 12, norm=norm, eps=1e-3), torch.randn(2, 5, 8)
    h = normalise(x, norm, 1e-3)
    gate, up, down = (getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
    gated = (h @ gate.mT) / (1 + (-(h @ gate.mT)).exp()) * (h @ up.mT)
    assert_close(mlp(x), gated @ down.mT)


def test_its_default_width_has_as_many_weights_as_the_papers() -> None:
    mlp = GatedMLP(768)
    assert mlp.d_hidden == 2048
    assert sum(p.numel() for p in mlp.parameters()) == 2 * 768 * 4 * 768
    assert GatedMLP(8).d_hidden == 64
    assert describe(GatedMLP(8))["init_args"]["d_hidden"] == 64


def test_output_projections_shrink_with_the_branches() -> None:
    mlp = GatedMLP(256)
    mlp.reset_parameters(n_branches=4)
    deviations = [p.std().item() for p in mlp.parameters()]
    assert deviations == pytest.approx([0.02, 0.02, 0.01], rel=0.05)


@pytest.mark.parametrize(
    "mixer",
    [SoftmaxAttention(8, 2, norm="rms"), QuadraticRelation(8, 12, norm="rms")],
    ids=["softmax", "quadratic"],
)
def test_a_network_with_rms_norms_and_a_gated_mlp(mixer) -> None:
    network = LanguageModel(mixer, 11, n_layers=2, max_length=20, mlp=GatedMLP(8, 16), norm="rms").eval()
    torch.nn.init.normal_(network.head.weight)
    tokens = torch.randint(11, (2, 9))
    x = torch.randn(2, 3, 8) + 3
    assert_close(network.unembed(x), network.head(normalise(x, "rms", network.eps)))
    logits = network(tokens)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    rebuilt = build(describe(network)).eval()
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(rebuilt(tokens), logits)
    context = tokens
    for _ in range(5):
        context = torch.cat([context, network(context)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(network, tokens, 5, GREEDY), context[:, 9:])
    without = LanguageModel(mixer, 11, n_layers=2, max_length=20, norm="rms")
    assert forward_cost(network, 9).flops - forward_cost(without, 9).flops == 2 * 3 * 2 * 9 * 8 * 16
