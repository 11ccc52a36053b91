"""Draws docs/images/model.png: the block, its pairs on a string that is copied, and how a small s_ij becomes a large exponent."""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch, Rectangle

TOKENS = ["BOS", "a", "b", "c", "SEP", "a", "b", "c"]
# Where each answering position finds the letter that comes next: SEP at a, a at b, b at c.
READS = {4: 1, 5: 2, 6: 3}
BLUE, ORANGE, GREY = "#3b6ea5", "#d9822b", "#d8dde3"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args(arguments)
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.6), width_ratios=(1.25, 1, 1.1), layout="constrained")
    draw_block(axes[0])
    draw_pairs(axes[1])
    draw_exponents(axes[2])
    figure.savefig(options.output, dpi=120)


def draw_block(axis: Any) -> None:
    boxes = {
        "x": (0.5, 0.04, "x", GREY),
        "norm": (0.5, 0.19, "norm", GREY),
        "q": (0.25, 0.36, "$W_q$,  position i receives", BLUE),
        "k": (0.75, 0.36, "$W_k$,  position j contributes", BLUE),
        "pairs": (0.5, 0.55, r"mean over $j \leq i$ of  exp( norm($q_i + k_j$) )", ORANGE),
        "out": (0.5, 0.73, "$W_o$ norm", BLUE),
        "sum": (0.5, 0.9, "x + ", GREY),
    }
    half = {"q": 0.23, "k": 0.23, "pairs": 0.36}
    for name, (x, y, text, colour) in boxes.items():
        width = half.get(name, 0.12)
        axis.add_patch(
            FancyBboxPatch(
                (x - width, y - 0.04), 2 * width, 0.08, boxstyle="round,pad=0.01", color=colour, alpha=0.85
            )
        )
        axis.text(
            x, y, text, ha="center", va="center", fontsize=9, color="black" if colour == GREY else "white"
        )
    arrows = [("x", "norm"), ("norm", "q"), ("norm", "k"), ("q", "pairs"), ("k", "pairs"), ("pairs", "out")]
    for start, end in [*arrows, ("out", "sum")]:
        (x0, y0), (x1, y1) = boxes[start][:2], boxes[end][:2]
        axis.annotate("", (x1, y1 - 0.055), (x0, y0 + 0.055), arrowprops={"arrowstyle": "->"})
    axis.plot([0.38, 0.0, 0.0], [0.04, 0.04, 0.9], color="black", linewidth=1)
    axis.annotate("", (0.37, 0.9), (0.0, 0.9), arrowprops={"arrowstyle": "->"})
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.0), title="one layer: there is no other part")
    axis.axis("off")


def draw_pairs(axis: Any) -> None:
    for i in range(len(TOKENS)):
        for j in range(i + 1):
            colour = ORANGE if READS.get(i) == j else GREY
            axis.add_patch(Rectangle((j, i), 0.92, 0.92, color=colour))
    ticks = [t + 0.46 for t in range(len(TOKENS))]
    axis.set_xticks(ticks, TOKENS, fontsize=8)
    axis.set_yticks(ticks, TOKENS, fontsize=8)
    axis.set(
        xlim=(0, len(TOKENS)),
        ylim=(len(TOKENS), 0),
        xlabel="contributing position j",
        ylabel="receiving position i",
        title="pairs (i, j); orange: what copying has to find",
        aspect="equal",
    )


def draw_exponents(axis: Any) -> None:
    """The largest exponent of a pair over s_ij, for a sum of noise and of one channel that does not cancel."""
    generator = np.random.default_rng(2)
    channels = 192
    noise = generator.standard_normal(channels)
    rest = np.zeros(channels)
    rest[0] = 1.0
    # q_i + k_j = (1 - t) noise + t rest: as q_i cancels k_j, only one channel is left.
    left = np.linspace(1, 0, 200)
    sums = left[:, None] * noise + 0.25 * rest
    s = sums.std(1)
    largest = ((sums - sums.mean(1, keepdims=True)) / s[:, None]).max(1)
    axis.plot(s, largest, color=ORANGE, linewidth=2)
    axis.axhline((channels - 1) ** 0.5, color="black", linestyle="--", linewidth=1)
    axis.text(
        0.3, (channels - 1) ** 0.5 - 0.7, r"bound $\sqrt{D-1}$: it weighs $e^{13.8}$, a million", fontsize=8
    )
    axis.text(0.4, 3.3, "a pair of strangers: about $e^3$", fontsize=8)
    axis.set(
        xlabel="$s_{ij}$, standard deviation of $q_i + k_j$",
        ylabel="largest exponent",
        ylim=(0, 15),
        title="what cancels is amplified (D = 192)",
    )
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    main()
