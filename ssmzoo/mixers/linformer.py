"""Linformer: attention to keys and values projected along the sequence (Wang et al. 2020, arXiv 2006.04768)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmkernels import attention
from ssmkernels.core.packing import spans
from ssmzoo.init import starting
from ssmzoo.mixers._heads import HeadMixer, HeadOptions
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class LinformerOptions(HeadOptions):
    """Beside those of :class:`~ssmzoo.mixers._heads.HeadOptions`.

    Attributes:
        proj_len: k, how many projected keys and values there are.
        max_length: n, the longest sequence that it takes.
        sharing: "none" gives each head its own E and F; "headwise" shares them among all heads, and "key-value" is one
            matrix E = F for all (section 4, parameter sharing).
    """

    proj_len: int = 256
    max_length: int = 512
    sharing: Literal["none", "headwise", "key-value"] = "headwise"


@register_mixer("linformer")
class Linformer(HeadMixer):
    """Softmax attention to ``proj_len`` learned mixtures of all keys and values: linear in length, never causal.

    It approximates softmax attention by one of low rank. For each head (equation 7), with E and F of
    ``(proj_len, max_length)``::

        out = softmax(Q (E K)ᵀ / √d) (F V)

    A sequence of l < max_length tokens uses the first l columns of E and F. A token's place shows in its column.

    Args:
        d_model: width of input and output.
        options: those of :class:`LinformerOptions`.

    Raises:
        ValueError: sizes that do not fit together; on a call, a sequence longer than max_length.
    """

    options_class = LinformerOptions
    causal = False
    has_state = False

    def __init__(self, d_model: int, **options: Any):
        o = LinformerOptions(**options)
        super().__init__(d_model, o)
        self.check_at_least(1, proj_len=o.proj_len, max_length=o.max_length)
        self.proj_len, self.max_length = o.proj_len, o.max_length
        # Variance 1 / k, for which projections keep lengths (theorem 2).
        shape = (self.n_heads if o.sharing == "none" else 1, o.proj_len, o.max_length)

        def projection() -> nn.Parameter:
            return nn.Parameter(starting(shape, None, lambda: torch.randn(shape) * o.proj_len**-0.5))

        self.E = projection()
        self.F = self.E if o.sharing == "key-value" else projection()

    def mixing_flops(self, context: int) -> float:
        """4 proj_len · d for each head to project a key and a value, and as many to attend to the projected ones."""
        return 8 * self.proj_len * self.n_heads * self.head_dim

    def mix(self, x: Tensor, state: None, cu_seqlens: Tensor | None) -> tuple[Tensor, None]:
        q, k, v = (self.heads_of(x, p) for p in (self.q_proj, self.k_proj, self.v_proj))
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
