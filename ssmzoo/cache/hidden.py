"""Attention over hidden states in place of keys and values (EL-attention, Yan et al. 2021, arXiv 2105.04779).

With one head's projections W_q, W_k and W_v, and x_j the input of token j, equations 5 to 7 of the paper::

    (W_q x_i) · (W_k x_j) = (W_kᵀ W_q x_i) · x_j            Σ_j p_ij W_v x_j = W_v Σ_j p_ij x_j

A key's bias adds the same to all logits of a query, which the softmax takes away; as the weights p sum to 1, a value's
bias is added to the mean.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ssmzoo.cache.shared import PagedSharedCache, SharedCache


@dataclasses.dataclass
class HiddenCache(SharedCache):
    """The layer's input at each token, of width d_model, from which any number of heads make keys and values."""


@dataclasses.dataclass
class PagedHiddenCache(PagedSharedCache):
    """The same in pages."""

    dense_class = HiddenCache


def fold(q: Tensor, k_proj: nn.Linear, n_kv_heads: int) -> Tensor:
    """Queries that meet hidden states: (b l h k) → W_kᵀ q (b l h d_model)."""
    weight = k_proj.weight.view(n_kv_heads, q.shape[-1], -1)  # (g k d)
    return torch.einsum("blgrk,gkd->blgrd", q.unflatten(2, (n_kv_heads, -1)), weight).flatten(2, 3)


def unfold(out: Tensor, v_proj: nn.Linear, n_kv_heads: int) -> Tensor:
    """Means of values from means of hidden states: (b l h d_model) → W_v out (b l h v)."""
    weight = v_proj.weight.view(n_kv_heads, -1, out.shape[-1])  # (g v d)
    means = torch.einsum("blgrd,gvd->blgrv", out.unflatten(2, (n_kv_heads, -1)), weight)
    if v_proj.bias is not None:
        means = means + v_proj.bias.view(n_kv_heads, 1, -1).to(means.dtype)
    return means.flatten(2, 3)
