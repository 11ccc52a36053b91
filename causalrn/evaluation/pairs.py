"""The heat map of one layer: how much each earlier position contributes to each position."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalrn.evaluation.diagnostics import probe_pairs, relation_of
from causalrn.models import LanguageModel
from causalrn.system import new_figure

# Tokens that still have room for their names along an axis.
NAMED_TOKENS = 80


@torch.inference_mode()
def pair_norms(network: LanguageModel, tokens: Int[Tensor, " T"], layer: int) -> Float[Tensor, "H T T"]:
    """Norm over the channels of what position j adds to position i in a layer, per head; NaN where j > i.

    For the quadratic form this is |act(norm(q_i + k_j))|, for the linear one |exp(norm(q_i)) exp(norm(k_j))|, both
    before the 1 / (i + 1) and the normalisation (the official heat map of `bar_quadratic_causal_preact`).

    Args:
        network: of relation mixers.
        tokens: what the network reads.
        layer: 0 to n_layers - 1; negative ones count from the end.

    Raises:
        ValueError: no such layer, another kind of mixer, or more tokens than positions.
    """
    if not -network.n_layers <= layer < network.n_layers:
        raise ValueError(f"layer must be in [{-network.n_layers}, {network.n_layers}): got {layer}")
    x = network.embed(tokens[None], 0)
    for block in network.layers[: layer % network.n_layers]:
        x = block(x)
    mixer = relation_of(network.layers[layer])
    q, k = mixer.project(network.layers[layer].mixer_input(x))
    pairs = probe_pairs(mixer, q.float(), k.float(), torch.arange(len(tokens), device=tokens.device))
    later = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    return pairs.log_norm[0].exp().cpu().masked_fill(later, float("nan"))


def draw_pairs(norms: Float[Tensor, "T T"], names: list[str], position: int, title: str, path: Path) -> None:
    """Draws all pairs of a layer as a heat map, and those of one position as bars beside their tokens."""
    size = min(14.0, 4 + 0.16 * len(names))
    figure = new_figure(size, size + 2.5)
    heat, bars = figure.subplots(2, 1, height_ratios=(4, 1))
    image = heat.imshow(norms.numpy(), cmap="magma", interpolation="nearest")
    heat.axhline(position, color="tab:cyan", linewidth=0.8)
    heat.set(xlabel="contributing position j", ylabel="receiving position i", title=title)
    figure.colorbar(image, ax=heat, label="norm over channels")
    row = norms[position, : position + 1]
    bars.bar(range(len(row)), row.numpy(), color="tab:cyan")
    bars.set(
        xlim=(-0.5, len(names) - 0.5),
        xlabel="contributing position j",
        ylabel=f"position {position}",
    )
    if len(names) <= NAMED_TOKENS:
        for axis in (heat, bars):
            axis.set_xticks(range(len(names)), names, fontsize=7, rotation=90)
        heat.set_yticks(range(len(names)), names, fontsize=7)
    figure.savefig(path, dpi=150)


def describe_row(norms: Float[Tensor, "T T"], names: list[str], position: int) -> dict[str, Any]:
    """The contributions to one position as plain values."""
    return {
        "position": position,
        "tokens": names,
        "norms": [round(value, 6) for value in norms[position, : position + 1].tolist()],
    }
