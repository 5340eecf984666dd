"""The attention of hybrids, where the package has it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ssmkernels.compat.flash_attn import flash_attn_func, flash_attn_with_kvcache
from ssmkernels.compat.flash_attn.layers.rotary import RotaryEmbedding
from ssmkernels.compat.mamba_ssm._layers import Device, Recurrent, check_one_token, last_inputs, new_conv1d

__all__ = ["MHA"]


class MHA(Recurrent):
    """Attention with one projection for queries, keys and values, a convolution over them, and an MLP beside it.

    Args:
        embed_dim: width of input and output.
        num_heads, num_heads_kv: heads of queries, and of keys and values; as many if None.
        head_dim: channels of a head; embed_dim / num_heads if None.
        mlp_dim: width of a gated MLP beside attention, rounded up to a multiple of 256; none if 0.
        qkv_proj_bias, out_proj_bias: biases of the projections.
        softmax_scale: of the products; head_dim^-½ if None.
        causal: whether queries see no later keys.
        layer_idx: the place of the layer's cache in ``inference_params``.
        d_conv: width of the convolution; none if 0.
        rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved: as :class:`RotaryEmbedding`; no rotation if 0.
        device, dtype: of the weights.

    Raises:
        ValueError: heads that do not divide one another.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.num_heads_kv = num_heads, num_heads_kv or num_heads
        if num_heads % self.num_heads_kv:
            raise ValueError(f"MHA: `num_heads_kv` must divide the {num_heads} heads; got {num_heads_kv}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"MHA: `num_heads` must divide `embed_dim`, {embed_dim}; got {num_heads}, and no `head_dim`"
            )
        self.embed_dim, self.head_dim = embed_dim, head_dim or embed_dim // num_heads
        self.softmax_scale, self.causal, self.layer_idx = softmax_scale, causal, layer_idx
        self.d_conv, self.rotary_emb_dim = d_conv, rotary_emb_dim
        self.mlp_dim = math.ceil(mlp_dim / 256) * 256
        self._splits = [n * self.head_dim for n in (num_heads, self.num_heads_kv, self.num_heads_kv)]
        self._qkv_dim = sum(self._splits)
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, device=device)
        self.in_proj = nn.Linear(embed_dim, self._qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **made)
        if d_conv > 0:
            self.conv1d = new_conv1d(self._qkv_dim, d_conv, True, **made)
        self.out_proj = nn.Linear(self._splits[0] + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **made)

    def forward(self, x: Tensor, inference_params: Any = None) -> Tensor:
        """``(b, l, embed_dim)`` → the same; with ``inference_params`` the start of sequences, or what comes next.

        Raises:
            ValueError: several tokens after the start, with a convolution; no ``layer_idx``; more tokens than the cache
                has room for.
        """
        kv_cache = conv_state = None
        before: int | Tensor = 0
        if inference_params is not None:
            kv_cache, conv_state = self._rows(inference_params, len(x))
            before = inference_params.seqlen_offset
            if inference_params.lengths_per_sample is not None:
                before = inference_params.lengths_per_sample[: len(x)]
        qkv, mlp = self.in_proj(x).split([self._qkv_dim, self.mlp_dim], dim=-1)
        if self.d_conv > 0:
            started = inference_params is not None and inference_params.seqlen_offset > 0
            qkv = self._convolved(qkv, conv_state, started)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in qkv.split(self._splits, dim=-1))
        if self.rotary_emb_dim > 0:
            q, k = self.rotary_emb.turned(q, before), self.rotary_emb.turned(k, before)
        options: dict[str, Any] = {"softmax_scale": self.softmax_scale, "causal": self.causal}
        if kv_cache is None:
            y: Any = flash_attn_func(q, k, v, **options)
        else:
            k, v = k.to(kv_cache.dtype), v.to(kv_cache.dtype)
            lengths = before if isinstance(before, int) else before.to(torch.int32)
            y = flash_attn_with_kvcache(
                q.to(kv_cache.dtype), kv_cache[:, :, 0], kv_cache[:, :, 1], k, v, cache_seqlens=lengths, **options
            )
        y = y.flatten(-2).to(x.dtype)
        if self.mlp_dim:
            up, gate = mlp.chunk(2, dim=-1)
            y = torch.cat([y, up * F.silu(gate)], dim=-1)
        return self.out_proj(y)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """A cache ``(b, max_seqlen, 2, heads, head_dim)``, and the convolution's last inputs ``(b, d, d_conv)``."""
        new = self.out_proj.weight.new_zeros
        state = new(batch_size, self._qkv_dim, self.d_conv, dtype=dtype) if self.d_conv > 0 else None
        return new(batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim, dtype=dtype), state

    def _rows(self, inference_params: Any, sequences: int) -> tuple[Tensor, Tensor | None]:
        """The rows of the caches that a batch uses."""
        rows = slice(inference_params.batch_size_offset, inference_params.batch_size_offset + sequences)
        room = max(inference_params.max_batch_size, rows.stop)
        held, state = self.states_in(inference_params, room)
        return held[rows], None if state is None else state[rows]

    def _convolved(self, qkv: Tensor, state: Tensor | None, started: bool) -> Tensor:
        """Queries, keys and values (b l d) after the convolution, from its state on if a sequence has started."""
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        if state is not None and started:
            check_one_token("MHA", qkv)
            return causal_conv1d_update(qkv[:, 0], state, weight, bias)[:, None]
        if state is not None:
            last_inputs(qkv.detach().transpose(1, 2), state)
        y = causal_conv1d_fn(qkv.transpose(1, 2), weight, bias)
        assert isinstance(y, Tensor)
        return y.transpose(1, 2)
