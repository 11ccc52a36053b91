"""Turns checkpoints into other formats and other formats into checkpoints: `python -m causalrn.export VERB ...`."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch

from causalrn.cli import Parser, add_checkpoint, quiet_libraries
from causalrn.interop.huggingface.folder import read_folder, write_folder
from causalrn.interop.official import MODELS, describe_official, from_official
from causalrn.interop.step_export import INPUTS, OUTPUTS, write_step
from causalrn.models import LanguageModel
from causalrn.system import replacing
from causalrn.training.checkpoint import load_network, named_checkpoint, network_from, save_network
from causalrn.training.consolidate import read_sharded
from causalrn.training.errors import run_command


def main(args: list[str] | None = None) -> None:
    options = make_parser().parse_args(args)
    quiet_libraries()
    options.run(options)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m causalrn.export", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add_huggingface(verbs)
    add_import_huggingface(verbs)
    add_step(verbs)
    add_import_official(verbs)
    add_consolidate(verbs)
    return parser


def add_huggingface(verbs: Any) -> None:
    parser = verbs.add_parser(
        "huggingface", help="checkpoint -> folder for transformers, with its own modelling code"
    )
    add_checkpoint(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.set_defaults(run=export_huggingface)


def export_huggingface(options: argparse.Namespace) -> None:
    network = write_folder(named_checkpoint(options.checkpoint), options.output)
    print(f"{options.output}: {describe_size(network)}; load it with trust_remote_code=True")


def add_import_huggingface(verbs: Any) -> None:
    parser = verbs.add_parser(
        "import-huggingface", help="folder written by the verb huggingface -> checkpoint"
    )
    parser.add_argument("folder", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("--output", type=Path, help="checkpoint to write; by default FOLDER.ckpt")
    parser.set_defaults(run=import_huggingface)


def import_huggingface(options: argparse.Namespace) -> None:
    output = options.output or options.folder.with_name(f"{options.folder.name}.ckpt")
    network = read_folder(options.folder, output)
    print(f"{output}: {describe_size(network)}")


def add_step(verbs: Any) -> None:
    parser = verbs.add_parser("step", help="one decoding step of the linear CausalRN -> ONNX or torch.export")
    add_checkpoint(parser, "a model of linear relation mixers")
    parser.add_argument("--output", type=Path, required=True, help="file to make, .onnx or .pt2")
    parser.set_defaults(run=export_step)


def export_step(options: argparse.Namespace) -> None:
    network = load_network(named_checkpoint(options.checkpoint))
    write_step(network, options.output)
    print(f"{options.output}: {describe_size(network)}; {', '.join(INPUTS)} -> {', '.join(OUTPUTS)}")


def add_consolidate(verbs: Any) -> None:
    parser = verbs.add_parser(
        "consolidate",
        help="folder of a run under DeepSpeed or FSDP -> one file for any strategy and number of ranks",
        description="Puts the shards of a ZeRO or FSDP folder together, in float32, without the strategy that wrote them. "
        "Training resumes from the file (fit --resume FILE) under every strategy and number of ranks, with AdamW's "
        "state. Without optimizer state remain: other optimizers, and several parameter groups under ZeRO-3.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="folder as checkpoints/last.ckpt of such a run, or the run's own"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="file to make; to resume, beside CHECKPOINT in its run folder",
    )
    parser.set_defaults(run=consolidate)


def consolidate(options: argparse.Namespace) -> None:
    if options.output.exists():
        raise FileExistsError(f"{options.output} exists; want a new file for --output")
    path = named_checkpoint(options.checkpoint)
    if path.is_file():
        raise ValueError(f"checkpoint {path} is one file already; want a ZeRO or FSDP folder")
    checkpoint = read_sharded(path)
    network = network_from(checkpoint, path)
    with replacing(options.output) as temporary:
        torch.save(checkpoint, temporary)
    state = "with" if "optimizer_states" in checkpoint else "WITHOUT"
    print(
        f"{options.output}: {describe_size(network)}, step {checkpoint['global_step']}, {state} optimizer state"
    )


def describe_size(network: LanguageModel) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{network.layer_names}, {network.n_layers} layers, {parameters:,} parameters"


def add_import_official(verbs: Any) -> None:
    official = verbs.add_parser(
        "import-official",
        help="state dict of kerner-lab/causal-relation-networks -> checkpoint",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    official.add_argument("state_dict", type=Path, help="weights.pth of an official run")
    official.add_argument("--output", type=Path, help="checkpoint to write; by default STATE_DICT with .ckpt")
    official.add_argument("--model", choices=MODELS, help="official model; by default read off the keys")
    official.add_argument("--n-heads", type=int, default=1, help="official num_head")
    official.add_argument("--bidirectional", action="store_true", help="official enable_causal_mode = False")
    official.add_argument("--norm", choices=("layer", "rms"), default="layer", help="normalization_type")
    official.add_argument("--eps", type=float, default=0.0, help="official normalization_eps")
    official.add_argument("--pre-norm", choices=("exact", "approx", "none"), help="ablation: PreNorm")
    official.add_argument("--activation", choices=("exp", "relu", "elu", "gelu"), help="ablation: Activation")
    official.add_argument("--no-post-norm", action="store_true", help="ablation: PostNorm = no")
    official.set_defaults(run=import_official)


def import_official(options: argparse.Namespace) -> None:
    """Writes the checkpoint and says what it holds."""
    output = options.output or options.state_dict.with_suffix(".ckpt")
    if output.exists():
        raise FileExistsError(f"{output} exists; want a new file for --output")
    state_dict = read_state_dict(options.state_dict)
    ablation = {
        name: value
        for name, value in (("pre_norm", options.pre_norm), ("activation", options.activation))
        if value is not None
    }
    if options.no_post_norm:
        ablation["post_norm"] = False
    model = options.model or guess_model(state_dict, bool(ablation))
    description = describe_official(
        state_dict,
        model,
        n_heads=options.n_heads,
        causal=not options.bidirectional,
        norm=options.norm,
        eps=options.eps,
        **ablation,
    )
    network = from_official(state_dict, description)
    save_network(network, output)
    print(f"{output}: official {model}, {describe_size(network)}")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a file of torch.save.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"state dict {path}: no such file")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is truncated or no file of torch.save") from error
    if not isinstance(state_dict, dict) or not all(
        isinstance(value, torch.Tensor) for value in state_dict.values()
    ):
        raise ValueError(f"{path} holds no state dict; want a dict of tensors")
    return state_dict


def guess_model(state_dict: dict[str, torch.Tensor], has_ablation: bool) -> str:
    """The official model, where the keys tell: the two relation networks have the same ones.

    Raises:
        ValueError: the keys do not tell.
    """
    if any(key.endswith("attn.causal_mask") for key in state_dict):
        return "linear_transformer"
    if any("attn.fc_1" in key for key in state_dict):
        return "transformer"
    if has_ablation:
        return "relation_ablation"
    raise ValueError(
        "the weights of relation and linear_relation look alike; want --model to name which it is"
    )


if __name__ == "__main__":
    run_command(main)
