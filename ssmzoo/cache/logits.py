"""What the ops of attention are told of logits and masks, the same for whole sequences and for caches."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ssmkernels import attention, decode_attention


@dataclasses.dataclass(frozen=True)
class Logits:
    """Arguments that :func:`~ssmkernels.attention` and :func:`~ssmkernels.decode_attention` share.

    Attributes:
        scale: of the products of queries and keys.
        causal: no query sees a later key.
        window: tokens seen before and after a token's own, -1 for no bound.
        softcap: bounds the products smoothly; 0 for none.
        alibi_slopes: ``(h)``, linear penalties on distance.
        sinks: ``(h)``, one more logit per head that has no value.
    """

    scale: float
    causal: bool = True
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, cu_seqlens_k: Tensor | None = None
    ) -> Tensor:
        """Queries ``(b, l, h, k)`` over keys and values of whole sequences: ``(b, l, h, v)``."""
        out = attention(q, k, v, causal=self.causal, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, **self._shared())
        assert isinstance(out, Tensor)
        return out

    def decode(
        self, q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, block_table: Tensor | None = None
    ) -> Tensor:
        """A few queries of each sequence ``(s, l, h, k)``, the newest of its ``lengths`` tokens: ``(s, l, h, v)``."""
        out = decode_attention(q, keys, values, lengths, block_table=block_table, **self._shared())
        assert isinstance(out, Tensor)
        return out

    def _shared(self) -> dict[str, Any]:
        """What both ops take under the same names."""
        return {
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }
