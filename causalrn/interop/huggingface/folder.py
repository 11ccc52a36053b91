"""Writes a checkpoint as a Hugging Face folder, and reads such a folder back into a checkpoint, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

from causalrn.evaluation.codec import make_codec
from causalrn.interop.huggingface.sources import network_files
from causalrn.interop.huggingface.tokenizer import make_tokenizer
from causalrn.models import LanguageModel, build, describe
from causalrn.system import optional_module
from causalrn.training.checkpoint import PREFIX, network_from, read_checkpoint, save_network

HERE = Path(__file__).parent
# The part of the modelling code that is copied as it stands here; the networks' files are made from the package's sources.
CONFIGURATION, MODELING = "configuration_causalrn.py", "modeling_causalrn.py"
# The description of the tokenizer, from which the checkpoint's is restored as it was.
TOKENIZER_FILE = "causalrn_tokenizer.json"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {title}

A Causal Relation Network ([arXiv 2406.16168](https://arxiv.org/abs/2406.16168)) of {parameters:,} parameters, exported
from a causalrn checkpoint. The folder holds its own modelling code in plain PyTorch; where causalrn is installed, its
compiled kernels serve.

```python
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
{usage}
```
"""
WITH_TOKENIZER = """tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
prompt = tokenizer("abc", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=20)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
WITHOUT_TOKENIZER = """import torch

tokens = model.generate(torch.tensor([[0, 1, 2]]), max_new_tokens=20)"""


def write_folder(checkpoint_path: Path, output: Path) -> LanguageModel:
    """Writes config, weights, tokenizer and modelling code of a checkpoint into a new folder.

    Raises:
        ValueError: transformers is missing, or the network has parts that are not of causalrn.
        FileExistsError: the folder holds something.
    """
    optional_module("transformers", "huggingface", "the Hugging Face export")
    # Needs transformers, which is optional.
    from causalrn.interop.huggingface.configuration_causalrn import CausalRNConfig
    from causalrn.interop.huggingface.modeling_causalrn import CausalRNForCausalLM

    check_empty(output)
    checkpoint = read_checkpoint(checkpoint_path)
    network = network_from(checkpoint, checkpoint_path)
    codec_description = checkpoint["tokenizer"]
    stop_tokens = make_codec(codec_description).stop_tokens
    description = describe(network)
    check_classes(description)
    config = CausalRNConfig(description)
    config.eos_token_id = config.pad_token_id = stop_tokens[0] if stop_tokens else None
    config.auto_map = {
        "AutoConfig": f"{Path(CONFIGURATION).stem}.{CausalRNConfig.__name__}",
        "AutoModelForCausalLM": f"{Path(MODELING).stem}.{CausalRNForCausalLM.__name__}",
    }
    model = CausalRNForCausalLM(config)
    model.network.load_state_dict(network.state_dict())

    # Complete or absent: an interrupted export leaves no folder that looks whole.
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for name in (CONFIGURATION, MODELING):
        shutil.copyfile(HERE / name, partial / name)
    for name, text in network_files().items():
        (partial / name).write_text(text)
    tokenizer = make_tokenizer(codec_description)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    (partial / TOKENIZER_FILE).write_text(json.dumps(codec_description))
    (partial / "README.md").write_text(model_card(output.name, network, tokenizer is not None))
    if output.exists():
        output.rmdir()
    partial.replace(output)
    return network


def check_classes(description: Any) -> None:
    """Raises a ValueError for a class of a description whose source no folder gets."""
    if isinstance(description, dict):
        class_path = description.get("class_path", "causalrn.models.")
        if not class_path.startswith("causalrn.models."):
            raise ValueError(f"no Hugging Face form of {class_path!r}; want classes of causalrn.models alone")
    if isinstance(description, dict | list):
        for value in description.values() if isinstance(description, dict) else description:
            check_classes(value)


def check_empty(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists; want a new folder for --output")


def model_card(title: str, network: LanguageModel, has_tokenizer: bool) -> str:
    return CARD.format(
        title=title,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        tokenizer_import=", AutoTokenizer" if has_tokenizer else "",
        usage=WITH_TOKENIZER if has_tokenizer else WITHOUT_TOKENIZER,
    )


def read_folder(folder: Path, output: Path) -> LanguageModel:
    """Writes the checkpoint of an exported folder; nothing of the folder's code is run.

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: safetensors is missing, the folder is of another model, or its weights do not fit.
        FileExistsError: the checkpoint exists.
    """
    safetensors = optional_module("safetensors.torch", "huggingface", "reading a Hugging Face folder")
    if output.exists():
        raise FileExistsError(f"{output} exists; want a new file for --output")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "causalrn" or "network" not in config:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}; want an export of causalrn"
        )
    network = build(config["network"])
    assert isinstance(network, LanguageModel)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    weights: dict[str, Any] = {}
    for file in files:
        try:
            # Folders of former versions name the network's weights as the network does.
            weights |= {
                name.removeprefix(PREFIX): value for name, value in safetensors.load_file(file).items()
            }
        except Exception as error:
            raise ValueError(f"{file} is truncated or no safetensors file: {error}") from error
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: weights do not fit config.json: {' '.join(str(error).split())[:300]}"
        ) from error
    save_network(network, output, {"tokenizer": read_json(folder / TOKENIZER_FILE)})
    return network


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; want a folder of causalrn.export huggingface")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
