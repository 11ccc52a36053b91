"""One decoding step of the linear CausalRN as a graph of plain tensor operations, for torch.export and ONNX."""

import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalrn.models import LanguageModel, LinearRelation
from causalrn.ops.reference import LinearState, normalise, relation_linear_reference
from causalrn.system import optional_module

INPUTS = ("token", "position", "totals")
OUTPUTS = ("logits", "new_totals")


class LinearStep(nn.Module):
    """A network's step as a function of tensors only: the whole state is one sum per layer, head and channel.

    Args:
        network: of linear relation mixers.

    Raises:
        ValueError: another kind of mixer, whose state grows or has another form.
    """

    def __init__(self, network: LanguageModel) -> None:
        super().__init__()
        if (
            not isinstance(network.mixer, LinearRelation)
            or not network.mixer.causal
            or network.mlp is not None
            or network.short_convolution is not None
        ):
            raise ValueError(
                "only the causal linear CausalRN has a step of constant size: got "
                f"{network.layer_names}(causal={network.layers[0].mixer.causal})"
            )
        self.network = network.eval()

    def init_totals(self, batch_size: int) -> Float[Tensor, "L B H D"]:
        """`totals` before the first token."""
        mixer = self.network.mixer
        assert isinstance(mixer, LinearRelation)
        return torch.zeros(self.network.n_layers, batch_size, mixer.n_heads, mixer.d_hidden // mixer.n_heads)

    def forward(
        self, token: Int[Tensor, " B"], position: Int[Tensor, " B"], totals: Float[Tensor, "L B H D"]
    ) -> tuple[Float[Tensor, "B V"], Float[Tensor, "L B H D"]]:
        """Logits of the next token, and the totals to pass with it.

        Args:
            token: what stands at `position`.
            position: from 0 on, below max_length.
            totals: sums over the positions before; zeros at the first one.
        """
        network = self.network
        x = network.position_embedding(network.token_embedding(token), position)
        new_totals = []
        for block, total in zip(network.layers, totals.unbind(0), strict=True):
            mixer = block.mixer
            assert isinstance(mixer, LinearRelation)
            h = normalise(x, mixer.norm, mixer.eps)
            q, k = (
                proj(h).unflatten(-1, (mixer.n_heads, -1))[:, None] for proj in (mixer.q_proj, mixer.k_proj)
            )
            # Nothing here depends on the number of positions seen.
            state = LinearState(total, torch.zeros_like(total[:, 0, 0]))
            y, state = relation_linear_reference(q, k, state, eps=mixer.eps, norm=mixer.norm)
            x = x + mixer.out_proj(y[:, 0].flatten(1))
            new_totals.append(state.total)
        return network.head(normalise(x, network.norm, network.eps)), torch.stack(new_totals)

    def example_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        # Batch sizes 0 and 1 would be built into the graph.
        zeros = torch.zeros(2, dtype=torch.int64)
        return zeros, zeros.clone(), self.init_totals(2)


def export_program(network: LanguageModel) -> torch.export.ExportedProgram:
    """The step as a graph of torch.export, for any batch size.

    Raises:
        ValueError: see `LinearStep`.
    """
    step = LinearStep(network)
    batch = torch.export.Dim("batch")
    shapes = {"token": {0: batch}, "position": {0: batch}, "totals": {1: batch}}
    return torch.export.export(step, step.example_inputs(), dynamic_shapes=shapes)


def write_step(network: LanguageModel, output: Path) -> None:
    """Writes the step as a file of ONNX (.onnx) or of torch.export (.pt2), by the suffix of its name.

    Raises:
        ValueError: see `LinearStep`; another suffix, or a package is missing.
        FileExistsError: the file exists.
    """
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"--output must end in .onnx or .pt2: got {output.name}")
    if output.exists():
        raise FileExistsError(f"{output} exists; want a new file for --output")
    program = export_program(network)
    if output.suffix == ".pt2":
        torch.export.save(program, output)
        return
    for name in ("onnx", "onnxscript"):
        optional_module(name, "onnx", "the ONNX export")
    # The exporter's messages about further packages would hide our one line.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    exported: Any = torch.onnx.export(
        program, input_names=INPUTS, output_names=OUTPUTS, dynamo=True, verbose=False
    )
    exported.save(output)
