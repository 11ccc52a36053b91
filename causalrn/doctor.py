"""Checks this installation: `python -m causalrn.doctor` prints what is there, and holds every operator against its definition."""

import importlib.util
import json

from causalrn.cli import Parser
from causalrn.ops import native, selfcheck
from causalrn.system import available_bytes, environment, format_bytes
from causalrn.training.errors import run_command

# Packages that an extra brings, and what for.
OPTIONAL = {
    "triton": "operators on a GPU",
    "tokenizers": "BPE tokenizers",
    "pyarrow": "parquet files",
    "zstandard": ".zst files",
    "deepspeed": "ZeRO",
    "transformers": "Hugging Face folders",
    "lm_eval": "evaluate --tasks",
    "onnx": "exported steps",
    "wandb": "Weights & Biases",
    "mlflow": "MLflow",
}


def main(args: list[str] | None = None) -> None:
    parser = Parser(prog="python -m causalrn.doctor", description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave the operators unchecked")
    options = parser.parse_args(args)
    print(json.dumps(environment(), indent=2))
    for device in selfcheck.devices():
        free = available_bytes(device)
        print(f"{device}: {format_bytes(free) if free is not None else 'unknown'} free")
    print(f"compiled CPU kernels: {', '.join(native.supported_instruction_sets()) or 'none'}")
    for name, purpose in OPTIONAL.items():
        found = "there" if importlib.util.find_spec(name) else "missing"
        print(f"{name} ({purpose}): {found}")
    if not options.fast and selfcheck.main():
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
