"""The official models as plain functions of an official state dict, written from the paper and its equations.

It keeps what the official code does and the paper's equations do not say: the mask is -inf and stands before the
activation; the relation networks run in stable forms, which divide by a greatest channel that no gradient flows through;
the quadratic ones are causal whatever their configuration says.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def make_state_dict(
    model: str, *, vocab: int = 11, width: int = 8, hidden: int = 24, layers: int = 2, length: int = 10
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
    norm = partial(rms_norm if settings.get("norm") == "rms" else layer_norm, eps=settings.get("eps", 0.0))
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


def layer_norm(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, correction=0) + eps)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x / (x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]) + eps)


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
    a = F.linear(x, block["fc_1.weight"], block["fc_1.bias"])
    b = x @ block["fc_2.weight"].T
    if model == "linear_relation":
        out = norm(linear_sum(norm(a), norm(b), settings.get("causal", True)))
    elif model == "relation":
        out = norm(stable_pairs(a, b, norm, settings.get("n_heads", 1)))
    else:
        if settings.get("pre_norm") == "approx":
            a, b = norm(a), norm(b)
        out = plain_pairs(a, b, norm, settings)
        out = norm(out) if settings.get("post_norm", True) else out
    return F.linear(out, block["fc_3.weight"], block["fc_3.bias"])


def linear_sum(a: Tensor, b: Tensor, causal: bool) -> Tensor:
    """exp(a_i + log sum_j exp(b_j)) over its greatest channel; heads play no part, and only the causal form is a mean."""
    logs = a + (b.logcumsumexp(1) if causal else b.logsumexp(1, keepdim=True))
    out = (logs - logs.amax(-1, keepdim=True).detach()).exp()
    return out / torch.arange(1, a.shape[1] + 1)[:, None] if causal else out


def masked_pairs(a: Tensor, b: Tensor, heads: int, norm: Callable) -> Tensor:
    """norm(a_i + b_j) over the channels of each head, (B, H, T, T, D), -inf for j > i."""
    length = a.shape[1]
    a, b = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (a, b))
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return norm(a[:, :, :, None] + b[:, :, None]).masked_fill(future[..., None], float("-inf"))


def mean_over_heads(sums: Tensor) -> Tensor:
    """(B, H, T, D) over i + 1, as (B, T, H D)."""
    sums = sums / torch.arange(1, sums.shape[2] + 1)[:, None]
    return sums.transpose(1, 2).flatten(2)


def stable_pairs(a: Tensor, b: Tensor, norm: Callable, heads: int) -> Tensor:
    """The logarithm of the sum over j; less the greatest channel of its head, at every position; its exponential."""
    logs = masked_pairs(a, b, heads, norm).logsumexp(3)
    return mean_over_heads((logs - logs.amax(-1, keepdim=True).detach()).exp())


def plain_pairs(a: Tensor, b: Tensor, norm: Callable, settings: dict[str, Any]) -> Tensor:
    """The ablations' sum over j, which no stable form has."""
    pair_norm = norm if settings.get("pre_norm", "exact") == "exact" else lambda pairs: pairs
    activation = {"exp": torch.exp, "relu": F.relu, "elu": F.elu}[settings.get("activation", "exp")]
    return mean_over_heads(activation(masked_pairs(a, b, settings.get("n_heads", 1), pair_norm)).sum(3))
