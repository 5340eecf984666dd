"""Linformer: attention to keys and values projected along the sequence (Wang et al. 2020, arXiv 2006.04768)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ssmkernels import attention
from ssmkernels.core.packing import spans
from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer
from ssmzoo.registry import register_mixer


@register_mixer("linformer")
class Linformer(Mixer):
    """Softmax attention to ``proj_len`` learned mixtures of all keys and values: linear in length, never causal.

    It approximates softmax attention by one of low rank. For each head (equation 7), with E and F of
    ``(proj_len, max_length)``::

        out = softmax(Q (E K)ᵀ / √d) (F V)

    A sequence of l < max_length tokens uses the first l columns of E and F. A token's place shows in its column.

    Args:
        d_model: width of input and output.
        head_dim: d, width of each head.
        n_heads: heads; d_model / head_dim of them if None.
        proj_len: k, how many projected keys and values there are.
        max_length: n, the longest sequence that it takes.
        sharing: "none" gives each head its own E and F; "headwise" shares them among all heads, and "key-value" is one
            matrix E = F for all (section 4, parameter sharing).
        bias: biases on the query, key and value projections.
        out_bias: a bias on the output projection.

    Raises:
        ValueError: sizes that do not fit together; on a call, a sequence longer than max_length.
    """

    causal = False
    has_state = False

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int = 64,
        n_heads: int | None = None,
        proj_len: int = 256,
        max_length: int = 512,
        sharing: Literal["none", "headwise", "key-value"] = "headwise",
        bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__(d_model)
        for name, size in (
            ("head_dim", head_dim),
            ("n_heads", n_heads),
            ("proj_len", proj_len),
            ("max_length", max_length),
        ):
            if size is not None and size < 1:
                raise ValueError(f"Linformer: `{name}` must be at least 1; got {size}")
        if n_heads is None:
            if d_model % head_dim:
                raise ValueError(
                    f"Linformer: `head_dim` must divide d_model, or `n_heads` be given; got head_dim={head_dim} and "
                    f"d_model={d_model}"
                )
            n_heads = d_model // head_dim
        self.head_dim, self.n_heads = head_dim, n_heads
        self.proj_len, self.max_length = proj_len, max_length
        inner = n_heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, inner, bias=bias) for _ in range(3))
        self.out_proj = Linear(inner, d_model, bias=out_bias)
        # Variance 1 / k, for which projections keep lengths (theorem 2).
        shape = (n_heads if sharing == "none" else 1, proj_len, max_length)
        self.E = nn.Parameter(torch.randn(shape) * proj_len**-0.5)
        self.F = self.E if sharing == "key-value" else nn.Parameter(torch.randn(shape) * proj_len**-0.5)

    def mixing_flops(self, context: int) -> float:
        """4 proj_len · d for each head to project a key and a value, and as many to attend to the projected ones."""
        return 8 * self.proj_len * self.n_heads * self.head_dim

    def mix(self, x: Tensor, state: None, cu_seqlens: Tensor | None) -> tuple[Tensor, None]:
        q, k, v = (p(x).unflatten(-1, (self.n_heads, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        borders = None
        if cu_seqlens is None:
            k, v = self._projected(self.E, k), self._projected(self.F, v)
        else:
            # Empty sequences get projected keys as well, which no query sees.
            times = [time for _, time in spans(cu_seqlens)]
            k, v = (
                torch.cat([t[:, :0], *(self._projected(matrix, t[:, time]) for time in times)], dim=1)
                for matrix, t in ((self.E, k), (self.F, v))
            )
            borders = torch.arange(len(cu_seqlens), dtype=torch.int32, device=x.device) * self.proj_len
        out = attention(q, k, v, cu_seqlens=cu_seqlens, cu_seqlens_k=borders)
        assert isinstance(out, Tensor)
        return self.out_proj(out.flatten(2)), None

    def _projected(self, matrix: Tensor, x: Tensor) -> Tensor:
        """The matrix's leading columns times keys or values: (b l h d) → (b proj_len h d)."""
        l = x.shape[1]
        if l > self.max_length:
            raise ValueError(f"Linformer: sequences must not be longer than `max_length`={self.max_length}; got {l}")
        return (matrix[..., :l] @ x.transpose(1, 2)).transpose(1, 2)
