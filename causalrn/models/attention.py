"""The mixers of the paper's baselines: causal softmax attention and linear attention."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalrn.models.cache import GrowingCache
from causalrn.models.mixer import Mixer, Stream, check_heads, normal_linear_
from causalrn.models.pair_terms import Gain, PairBias, check_pair_terms
from causalrn.models.positions import Rotary
from causalrn.ops import normalise
from causalrn.system import check_range

Heads = Float[Tensor, "B T H D"]


class Attention(Mixer):
    """The base of both attentions: q, k and v come from one projection of norm(x), without biases, before an output projection.

    Args:
        d_model: width C of the residual stream, divided among the heads.
        n_heads: number of heads.
        causal: False lets every position see the whole sequence.
        norm: plain normalisation of the input, see `Relation`.
        eps: added to the standard deviation.

    Raises:
        ValueError: d_model is not divisible by n_heads, or a number below what makes sense.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 1,
        causal: bool = True,
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, causal)
        check_range(self, "[1, inf)", n_heads=n_heads)
        check_range(self, "[0, inf)", eps=eps)
        check_heads(d_model, n_heads)
        self.n_heads = n_heads
        self.norm: Literal["layer", "rms"] = norm
        self.eps = eps
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def reset_parameters(self, n_branches: int) -> None:
        normal_linear_(self.qkv_proj, 0.02)
        normal_linear_(self.out_proj, 0.02 / math.sqrt(n_branches))

    def project(self, x: Stream) -> tuple[Heads, Heads, Heads]:
        """q, k and v of the input."""
        qkv = self.qkv_proj(normalise(x, self.norm, self.eps))
        q, k, v = rearrange(qkv, "b t (three h d) -> three b t h d", three=3, h=self.n_heads).unbind(0)
        return q, k, v


class SoftmaxAttention(Attention):
    """Scaled dot-product attention (official `SelfAttention`); decoding keeps k and v of every position.

    Args:
        rotary: turns q and k by their positions; not at all if None.
        gain: factor on the logits at each receiving position; 1 if None.
        bias: slopes and windows of the heads; none if None.

    Raises:
        ValueError: a gain or bias of another number of heads, or an odd number of channels to turn.
    """

    # Queries whose pairs with every key are formed at a time, where a bias has to be.
    BIASED_QUERIES = 256

    def __init__(
        self,
        d_model: int,
        n_heads: int = 1,
        causal: bool = True,
        norm: Literal["layer", "rms"] = "layer",
        eps: float = 1e-5,
        rotary: Rotary | None = None,
        gain: Gain | None = None,
        bias: PairBias | None = None,
    ) -> None:
        super().__init__(d_model, n_heads, causal, norm, eps)
        check_pair_terms(gain, bias, n_heads)
        if rotary is not None and d_model // n_heads % 2:
            raise ValueError(f"rotary turns pairs of channels: got {d_model // n_heads} channels per head")
        self.rotary = rotary
        self.gain = gain
        self.bias = bias

    def reset_parameters(self, n_branches: int) -> None:
        super().reset_parameters(n_branches)
        if self.gain is not None:
            self.gain.reset_parameters()

    def project_at(self, x: Stream, positions: Int[Tensor, "#B T"]) -> tuple[Heads, Heads, Heads]:
        """q, k and v with what depends on their own positions."""
        q, k, v = self.project(x)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if self.gain is not None:
            q = q * self.gain(positions)[..., None].to(q.dtype)
        return q, k, v

    def attend(
        self,
        q: Float[Tensor, "B T H D"],
        k: Float[Tensor, "B S H D"],
        v: Float[Tensor, "B S H D"],
        positions: Int[Tensor, "#B T"],
    ) -> Stream:
        """Mixes the positions of k and v for the queries at `positions`, the last of each row's."""
        q, k, v = (rearrange(t, "b t h d -> b h t d") for t in (q, k, v))
        new, total = q.shape[2], k.shape[2]
        if self.bias is not None:
            y = self.attend_biased(q, k, v, positions)
        elif not self.causal or new == total:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            mask = (torch.arange(total, device=k.device) <= positions[..., None])[:, None]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(y, "b h t d -> b t (h d)"))

    def attend_biased(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B H S D"],
        v: Float[Tensor, "B H S D"],
        positions: Int[Tensor, "#B T"],
    ) -> Float[Tensor, "B H T D"]:
        assert self.bias is not None
        keys = torch.arange(k.shape[2], device=k.device)
        outputs = []
        parts = zip(q.split(self.BIASED_QUERIES, 2), positions.split(self.BIASED_QUERIES, 1), strict=True)
        for queries, places in parts:
            mask = self.bias.log_weights(places, keys, self.causal).to(q.dtype)
            outputs.append(F.scaled_dot_product_attention(queries, k, v, attn_mask=mask))
        return torch.cat(outputs, dim=2)

    def forward(self, x: Stream) -> Stream:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.attend(*self.project_at(x, positions), positions)

    def init_cache(
        self, batch_size: int, *, cache_dtype: torch.dtype | None = None, capacity: int = 0
    ) -> tuple[GrowingCache, GrowingCache]:
        self.check_causal()
        return GrowingCache(cache_dtype, capacity), GrowingCache(cache_dtype, capacity)

    def extend(
        self, x: Stream, cache: tuple[GrowingCache, GrowingCache]
    ) -> tuple[Stream, tuple[GrowingCache, GrowingCache]]:
        seen, lengths = cache[0].length, cache[0].lengths
        start = torch.tensor([[seen]], device=x.device) if lengths is None else lengths[:, None]
        positions = start + torch.arange(x.shape[1], device=x.device)
        q, k, v = self.project_at(x, positions)
        k, v = cache[0].append(k).to(q.dtype), cache[1].append(v).to(q.dtype)
        return self.attend(q, k, v, positions), cache

    def cache_bytes(self, length: int, cache_dtype: torch.dtype = torch.float32) -> int:
        return 2 * cache_dtype.itemsize * length * self.d_model


class LinearAttention(Attention):
    """Normalised linear attention with the feature map elu + 1 (official `LinearSelfAttention`).

    The cache is one matrix and one vector per head: the sums over positions of k v^T and of k. The causal
    form runs in parts of `PART` positions, quadratic inside a part, so that time and memory are linear.
    """

    PART = 128

    def mix(self, x: Stream, cache: tuple[Tensor, Tensor] | None) -> tuple[Stream, tuple[Tensor, Tensor]]:
        q, k, v = self.project(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        if self.causal:
            scores = scores.tril()
        y = torch.einsum("bhij,bjhd->bihd", scores, v)
        weight = rearrange(scores.sum(-1), "b h i -> b i h 1")
        kv_sum, k_sum = torch.einsum("bjhd,bjhe->bhde", k, v), k.sum(1)
        if cache is not None:
            y = y + torch.einsum("bihd,bhde->bihe", q, cache[0].to(q.dtype))
            weight = weight + torch.einsum("bihd,bhd->bih", q, cache[1].to(q.dtype))[..., None]
            kv_sum, k_sum = cache[0] + kv_sum, cache[1] + k_sum
        return self.out_proj(rearrange(y / weight, "b t h d -> b t (h d)")), (kv_sum, k_sum)

    def forward(self, x: Stream) -> Stream:
        if not self.causal or x.shape[1] <= self.PART:
            return self.mix(x, None)[0]
        return self.extend(x, self.init_cache(len(x)))[0]

    def init_cache(
        self, batch_size: int, *, cache_dtype: torch.dtype | None = None, capacity: int = 0
    ) -> tuple[Tensor, Tensor]:
        self.check_causal()
        channels = self.d_model // self.n_heads
        device = self.qkv_proj.weight.device
        shape = (batch_size, self.n_heads, channels)
        # Sums over positions are kept in float32 whatever the weights are held in.
        return torch.zeros(*shape, channels, device=device), torch.zeros(shape, device=device)

    def extend(self, x: Stream, cache: tuple[Tensor, Tensor]) -> tuple[Stream, tuple[Tensor, Tensor]]:
        outputs = []
        for part in x.split(self.PART, dim=1):
            y, cache = self.mix(part, cache)
            outputs.append(y)
        return torch.cat(outputs, dim=1), cache

    def cache_bytes(self, length: int, cache_dtype: torch.dtype = torch.float32) -> int:
        channels = self.d_model // self.n_heads
        return 4 * self.n_heads * channels * (channels + 1)
