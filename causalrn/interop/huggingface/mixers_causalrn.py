"""The blocks of a CausalRN language model in plain PyTorch, for training and decoding; copied into every exported folder.

Letters: B batch, T new positions, S all positions so far, H heads, D channels of a head.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Pair elements (B, queries, keys, H, D) formed at a time.
TILE_ELEMENTS = 2**22
# Positions of linear attention taken at a time: quadratic inside, linear across.
PART = 128

ACTIVATIONS = {"exp": torch.exp, "relu": F.relu, "elu": F.elu, "gelu": F.gelu, "official_elu": F.elu}


def normalise(x: Tensor, norm: str, eps: float) -> Tensor:
    """Plain normalisation over the last axis; eps is added to the (population) standard deviation."""
    if norm == "none":
        return x
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


def visible_pairs(n_new: int, n_all: int, causal: bool, mask: Tensor | None, device: torch.device) -> Tensor:
    """Whether each of the last `n_new` positions sees each position, (B or 1, T, S); `mask` (B, S) is 0 at padding."""
    visible = torch.ones(n_new, n_all, dtype=torch.bool, device=device)
    if causal:
        visible = visible.tril(n_all - n_new)
    return visible[None] if mask is None else visible & mask.bool()[:, None]


class Mixer(nn.Module, ABC):
    """One residual branch over positions. `state` is a tuple of tensors whose first axis is the batch, or None."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.d_model, self.n_heads = settings["d_model"], settings["n_heads"]
        self.causal, self.norm, self.eps = settings["causal"], settings["norm"], settings["eps"]

    @abstractmethod
    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the branch adds at the new positions, and the state after them."""

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))


class Relation(Mixer):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.q_proj = nn.Linear(self.d_model, settings["d_hidden"])
        self.k_proj = nn.Linear(self.d_model, settings["d_hidden"], bias=False)
        self.out_proj = nn.Linear(settings["d_hidden"], self.d_model)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = normalise(x, self.norm, self.eps)
        # exp and its sums are taken in float32 whatever the weights are held in.
        return self.split_heads(self.q_proj(x)).float(), self.split_heads(self.k_proj(x)).float()


class QuadraticRelation(Relation):
    """out_i = 1/n_i sum_j act(norm(q_i + k_j)) over the visible positions j; the state is k of every position."""

    has_post_norm = True

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.pre_norm, self.activation = settings["pre_norm"], settings["activation"]

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k = self.project(x)
        if self.pre_norm == "approx":
            q, k = normalise(q, self.norm, self.eps), normalise(k, self.norm, self.eps)
        if state is not None:
            k = torch.cat([state[0], k], dim=1)
        out = self.relate(q, k, mask).flatten(2)
        if self.activation == "official_elu" and self.causal:
            if state is not None or mask is not None:
                raise ValueError("activation official_elu depends on the whole length; want use_cache=False")
            position = torch.arange(x.shape[1], device=x.device)[:, None]
            out = out + (position + 1 - x.shape[1]) / (position + 1)
        if self.has_post_norm:
            out = normalise(out, self.norm, self.eps)
        return self.out_proj(out.to(x.dtype)), (k,)

    def relate(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over visible pairs, tile by tile, so that memory grows with S and not with T * S."""
        visible = visible_pairs(q.shape[1], k.shape[1], self.causal, mask, q.device)
        size = max(1, int((TILE_ELEMENTS / (len(q) * q.shape[2] * q.shape[3])) ** 0.5))
        rows = []
        for queries, seen in zip(q.split(size, 1), visible.split(size, 1), strict=True):
            total = torch.zeros_like(queries)
            for keys, pairs in zip(k.split(size, 1), seen.split(size, 2), strict=True):
                if pairs.any():
                    total = total + self.tile(queries, keys, pairs)
            # A row of padding sees nothing; what it holds is never used, but must be a number.
            rows.append(total / seen.sum(-1).clamp(min=1)[:, :, None, None])
        return torch.cat(rows, dim=1)

    def tile(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(self.sum_pairs, q, k, visible, use_reentrant=False)
        return self.sum_pairs(q, k, visible)

    def sum_pairs(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        norm = self.norm if self.pre_norm == "exact" else "none"
        pairs = ACTIVATIONS[self.activation](normalise(q[:, :, None] + k[:, None], norm, self.eps))
        return pairs.masked_fill(~visible[..., None, None], 0).sum(2)


class QuadraticRelationWithoutPostNorm(QuadraticRelation):
    has_post_norm = False


class LinearRelation(Relation):
    """exp(norm(q_i)) sum_j exp(norm(k_j)), normalised: the sum over positions is the whole state."""

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k = self.project(x)
        weights = normalise(k, self.norm, self.eps).exp()
        if mask is not None:
            weights = weights.masked_fill(mask[:, -x.shape[1] :, None, None] == 0, 0)
        # In float64, so that a million positions lose no digits.
        sums = weights.cumsum(1, dtype=torch.float64)
        if not self.causal:
            sums = sums[:, -1:].expand_as(sums)
        if state is not None:
            sums = sums + state[0][:, None]
        # Before the first real position there is only padding, which needs some number.
        sums = torch.where(sums > 0, sums, 1.0)
        log_y = (normalise(q, self.norm, self.eps) + sums.float().log()).flatten(2)
        y = normalise((log_y - log_y.amax(-1, keepdim=True)).exp(), self.norm, self.eps)
        total = sums[:, -1]
        return self.out_proj(y.to(x.dtype)), (total,)


class Attention(Mixer):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.qkv_proj = nn.Linear(self.d_model, 3 * self.d_model, bias=False)
        self.out_proj = nn.Linear(self.d_model, self.d_model, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(normalise(x, self.norm, self.eps)).chunk(3, dim=-1)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)


class SoftmaxAttention(Attention):
    """The state is k and v of every position."""

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = self.project(x)
        if state is not None:
            k, v = torch.cat([state[0], k], dim=1), torch.cat([state[1], v], dim=1)
        visible = visible_pairs(q.shape[1], k.shape[1], self.causal, mask, x.device)
        # A row of padding sees itself only, so that softmax has something to add up.
        visible = visible | torch.ones_like(visible[0]).tril(k.shape[1] - q.shape[1]).triu(
            k.shape[1] - q.shape[1]
        )
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(*heads_first, attn_mask=visible[:, None])
        return self.out_proj(y.transpose(1, 2).flatten(2)), (k, v)


class LinearAttention(Attention):
    """Feature map elu + 1, normalised; the state is the sums over positions of k v^T and of k."""

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, k, v = self.project(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if mask is not None:
            k = k * (mask[:, -x.shape[1] :, None, None] != 0)
        if state is None:
            state = (k.new_zeros(*k[:, 0].shape, v.shape[-1]), torch.zeros_like(k[:, 0]))
        rows = []
        for part in range(0, x.shape[1], PART if self.causal else x.shape[1]):
            stop = part + PART if self.causal else x.shape[1]
            y, state = self.mix(q[:, part:stop], k[:, part:stop], v[:, part:stop], state)
            rows.append(y)
        return self.out_proj(torch.cat(rows, dim=1).flatten(2)), state

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        if self.causal:
            scores = scores.tril()
        y = torch.einsum("bhij,bjhd->bihd", scores, v) + torch.einsum("bihd,bhde->bihe", q, state[0])
        weight = scores.sum(-1).transpose(1, 2) + torch.einsum("bihd,bhd->bih", q, state[1])
        y = y / torch.where(weight > 0, weight, 1.0)[..., None]
        return y, (state[0] + torch.einsum("bjhd,bjhe->bhde", k, v), state[1] + k.sum(1))


MIXERS: dict[str, type[Mixer]] = {
    mixer.__name__: mixer
    for mixer in (
        QuadraticRelation,
        QuadraticRelationWithoutPostNorm,
        LinearRelation,
        SoftmaxAttention,
        LinearAttention,
    )
}


class MLP(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.norm, self.eps = settings["norm"], settings["eps"]
        self.fc_1 = nn.Linear(settings["d_model"], settings["d_hidden"])
        self.fc_2 = nn.Linear(settings["d_hidden"], settings["d_model"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_2(F.gelu(self.fc_1(normalise(x, self.norm, self.eps))))


class Block(nn.Module):
    def __init__(self, mixer: Mixer, mlp: MLP | None) -> None:
        super().__init__()
        self.mixer = mixer
        self.mlp = mlp

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, new_state = self.mixer(x, state, mask)
        x = x + y
        return (x if self.mlp is None else x + self.mlp(x)), new_state
