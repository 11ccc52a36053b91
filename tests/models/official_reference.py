"""The official models as plain functions of an official state dict, written from the paper and its equations.

It keeps what the official code does differently from ours: the mask is -inf and stands before the activation.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def make_state_dict(
    model: str, *, vocab: int = 11, width: int = 8, hidden: int = 12, layers: int = 2, length: int = 10
) -> Weights:
    """Random weights under the official keys."""
    weights = {
        "pre_block.wte.weight": torch.randn(vocab, width),
        "pre_block.wpe.weight": torch.randn(length, width),
        "pre_block.pos": torch.arange(length)[None],
        "post_block.fc_cls.weight": torch.randn(vocab, width),
    }
    for layer in range(layers):
        block = f"block_all.{layer}."
        if "transformer" in model:
            shapes = {
                "attn.fc_1.weight": (3 * width, width),
                "attn.fc_2.weight": (width, width),
                "mlp.fc_1.weight": (hidden, width),
                "mlp.fc_1.bias": (hidden,),
                "mlp.fc_2.weight": (width, hidden),
                "mlp.fc_2.bias": (width,),
            }
            if model == "linear_transformer":
                weights[block + "attn.causal_mask"] = torch.ones(length, length).tril()[None, None]
        else:
            shapes = {
                "fc_1.weight": (hidden, width),
                "fc_1.bias": (hidden,),
                "fc_2.weight": (hidden, width),
                "fc_3.weight": (width, hidden),
                "fc_3.bias": (width,),
            }
        for name, shape in shapes.items():
            weights[block + name] = torch.randn(shape) / math.sqrt(shape[-1])
    return weights


def official_logits(weights: Weights, tokens: Tensor, model: str, **settings: Any) -> Tensor:
    """Logits (B, T, V) of the official `Model`."""
    norm = rms_norm if settings.get("norm") == "rms" else layer_norm
    x = weights["pre_block.wte.weight"][tokens] + weights["pre_block.wpe.weight"][: tokens.shape[1]]
    n_layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("block_all."))
    for layer in range(n_layers):
        prefix = f"block_all.{layer}."
        block = {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
        if "transformer" in model:
            x = x + attention(block, norm(x), model, settings)
            hidden = F.gelu(F.linear(norm(x), block["mlp.fc_1.weight"], block["mlp.fc_1.bias"]))
            x = x + F.linear(hidden, block["mlp.fc_2.weight"], block["mlp.fc_2.bias"])
        else:
            x = x + relation(block, norm(x), model, norm, settings)
    return norm(x) @ weights["post_block.fc_cls.weight"].T


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)


def rms_norm(x: Tensor) -> Tensor:
    return math.sqrt(x.shape[-1]) * x / x.norm(dim=-1, keepdim=True)


def attention(block: Weights, x: Tensor, model: str, settings: dict[str, Any]) -> Tensor:
    heads, causal = settings.get("n_heads", 1), settings.get("causal", True)
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in (x @ block["attn.fc_1.weight"].T).chunk(3, -1)
    )
    if model == "transformer":
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
        scores = scores.tril() if causal else scores
        y = scores / scores.sum(-1, keepdim=True) @ v
    return y.transpose(1, 2).flatten(2) @ block["attn.fc_2.weight"].T


def relation(block: Weights, x: Tensor, model: str, norm: Callable, settings: dict[str, Any]) -> Tensor:
    heads, causal = settings.get("n_heads", 1), settings.get("causal", True)
    length = x.shape[1]
    a = F.linear(x, block["fc_1.weight"], block["fc_1.bias"])
    b = x @ block["fc_2.weight"].T
    count = torch.arange(1, length + 1)[:, None] if causal else length
    if model == "linear_relation":
        # Its norms run over all heads together, as the official block's do.
        exp_b = norm(b).exp()
        sums = exp_b.cumsum(1) if causal else exp_b.sum(1, keepdim=True)
        out = norm(norm(a).exp() * sums / count)
    else:
        pre_norm = settings.get("pre_norm", "exact")
        if pre_norm == "approx":
            a, b = norm(a), norm(b)
        a, b = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (a, b))
        pairs = a[:, :, :, None] + b[:, :, None]
        pairs = norm(pairs) if pre_norm == "exact" else pairs
        if causal:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            pairs = pairs.masked_fill(future[..., None], float("-inf"))
        activation = {"exp": torch.exp, "relu": F.relu, "elu": F.elu}[settings.get("activation", "exp")]
        out = (activation(pairs).sum(3)).transpose(1, 2).flatten(2) / count
        out = norm(out) if settings.get("post_norm", True) else out
    return F.linear(out, block["fc_3.weight"], block["fc_3.bias"])
