"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), where the package has them.

What the functions take:

- ``cos``, ``sin``: of each position, ``(positions, r / 2)``; the first r channels are turned.
- ``interleaved``: whether channels 0 and 1, 2 and 3, … are turned together; otherwise 0 and r/2, 1 and r/2 + 1, ….
- ``seqlen_offsets``: the position of the first token, a number or integers ``(b)``.

Functions that work in place write into their argument, and return a tensor of the same numbers, which has gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmkernels.compat._dtypes import INDICES, int32_borders
from ssmkernels.compat._rotary import turned
from ssmkernels.core.validate import check_dtypes, check_options, check_shapes

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
]


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with its first channels turned by its positions; further arguments as above.

    Args:
        x: ``(b, l, h, d)``, or ``(total, h, d)`` with ``cu_seqlens``.
        inplace: whether to write the result into x as well.
        cu_seqlens: borders ``(b + 1)`` of packed sequences.
        max_seqlen: has no effect.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or dtype, by name; positions beyond ``cos``.
    """
    op = "apply_rotary_emb"
    check_options(op, "bool", interleaved=interleaved, inplace=inplace)
    check_shapes(op, {"cos": (cos, "positions half"), "sin": (sin, "positions half")}, ("cos", "sin"))
    if cu_seqlens is None:
        check_shapes(op, {"x": (x, "b l h d")}, ("x",))
        first = _first(op, seqlen_offsets, len(x)).to(x.device)
        place = torch.arange(x.shape[1], device=x.device) + first[:, None]
    else:
        check_shapes(op, {"x": (x, "total h d")}, ("x",))
        borders = int32_borders(op, cu_seqlens, len(x)).long()
        lengths = borders.diff()
        start = _first(op, seqlen_offsets, len(lengths)).to(x.device) - borders[:-1]
        place = torch.arange(len(x), device=x.device) + start.repeat_interleave(lengths)
    y = turned(op, x, cos, sin, place.expand(x.shape[:-2]), interleaved, "cos")
    if inplace:
        x.data.copy_(y.detach())  # past autograd, which would not let views of several parts be written
    return y


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Queries and keys turned in place; further arguments as above.

    Args:
        qkv: ``(b, l, 3, h, d)``; or ``(b, l, heads of q, k and v, d)`` with ``num_heads_q``.
        cos_k, sin_k: for the keys; the same if None.

    Raises:
        TypeError, ValueError: as :func:`apply_rotary_emb`.
    """
    op = "apply_rotary_emb_qkv_"
    check_shapes(op, {"qkv": (qkv, "b l three h d" if num_heads_q is None else "b l heads d")}, ("qkv",), three=3)
    heads = qkv.flatten(2, -2)
    queries = heads.shape[2] // 3 if num_heads_q is None else num_heads_q
    keys, rest = divmod(heads.shape[2] - queries, 2)
    if rest or keys < 0:
        raise ValueError(
            f"{op}: `num_heads_q` must leave as many heads for keys as for values; got {queries} of {heads.shape[2]}"
        )
    q, k, v = heads.split([queries, keys, keys], dim=2)
    q = apply_rotary_emb(q, cos, sin, interleaved, False, seqlen_offsets)
    k = apply_rotary_emb(
        k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved, False, seqlen_offsets
    )
    y = torch.cat([q, k, v], dim=2).view(qkv.shape)
    qkv.data.copy_(y.detach())
    return y


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """The keys of ``kv (b, l, 2, h, d)`` turned in place; further arguments as above.

    Raises:
        TypeError, ValueError: as :func:`apply_rotary_emb`.
    """
    check_shapes("apply_rotary_emb_kv_", {"kv": (kv, "b l two h d")}, ("kv",), two=2)
    k = apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, False, seqlen_offsets)
    y = torch.stack([k, kv[:, :, 1]], dim=2)
    kv.data.copy_(y.detach())
    return y


class RotaryEmbedding(nn.Module):
    """Angles that grow with the position, at a rate of their own for each two channels.

    Args:
        dim: how many channels are turned.
        base: the rates are base^(-2i / dim).
        interleaved: as above.
        scale_base: None; XPos's scales are not supported.
        device: of the rates.

    Raises:
        ValueError: a ``scale_base``.
    """

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if scale_base is not None:
            raise ValueError(f"RotaryEmbedding: `scale_base` must be None, as XPos is not supported; got {scale_base}")
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self.register_buffer("inv_freq", self._rates(device), persistent=False)

    def _rates(self, device: torch.device | str | None) -> Tensor:
        return self.base ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Queries and keys turned in place.

        Args:
            qkv: as :func:`apply_rotary_emb_qkv_`; with ``kv`` the queries ``(b, l, h, d)`` alone.
            kv: ``(b, l, 2, h, d)``.
            seqlen_offset: the position of the first token, a number or integers ``(b)``.
            max_seqlen: has no effect.
        """
        tables = self._tables(qkv, seqlen_offset)
        if kv is None:
            how = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset, "num_heads_q": num_heads_q}
            return apply_rotary_emb_qkv_(qkv, *tables, **how)  # type: ignore[arg-type]
        q = apply_rotary_emb(qkv, *tables, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, *tables, self.interleaved, seqlen_offset)

    def turned(self, x: Tensor, seqlen_offset: int | Tensor = 0) -> Tensor:
        """x ``(b, l, h, d)`` turned, which stays as it is."""
        return apply_rotary_emb(x, *self._tables(x, seqlen_offset), self.interleaved, False, seqlen_offset)

    def _tables(self, x: Tensor, seqlen_offset: int | Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions up to the last one (positions dim/2), in x's dtype as the package's."""
        first = int(seqlen_offset.max()) if isinstance(seqlen_offset, Tensor) else seqlen_offset
        rates = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._rates(x.device)
        angles = torch.outer(torch.arange(first + x.shape[1], device=x.device, dtype=torch.float32), rates)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _first(op: str, seqlen_offsets: int | Tensor, sequences: int) -> Tensor:
    """The position of each sequence's first token (b)."""
    if not isinstance(seqlen_offsets, Tensor):
        check_options(op, "int", seqlen_offsets=seqlen_offsets)
        return torch.full((sequences,), seqlen_offsets)
    check_shapes(op, {"seqlen_offsets": (seqlen_offsets, "b")}, b=sequences)
    check_dtypes(op, {"seqlen_offsets": seqlen_offsets}, INDICES)
    return seqlen_offsets.long()
