"""What mixers of queries, keys and values by heads have in common: their options and their linear maps."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ssmzoo.linear import Linear
from ssmzoo.mixer import Mixer


@dataclasses.dataclass(kw_only=True)
class HeadOptions:
    """Options of all of them.

    Attributes:
        head_dim: d, width of each head.
        n_heads: heads; d_model / head_dim of them if None.
        bias: biases on the query, key and value projections.
        out_bias: a bias on the output projection.
    """

    head_dim: int = 64
    n_heads: int | None = None
    bias: bool = False
    out_bias: bool = False


class HeadMixer(Mixer):
    """Queries, keys and values of ``n_heads`` heads, and a map out of the heads.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = HeadOptions

    def __init__(self, d_model: int, options: HeadOptions):
        super().__init__(d_model)
        self.look_ahead(getattr(options, "bidirectional", False))
        self.check_at_least(1, head_dim=options.head_dim, n_heads=options.n_heads)
        self.head_dim = options.head_dim
        self.n_heads = heads_of_width(type(self).__name__, d_model, options.head_dim, options.n_heads)
        inner = self.n_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, inner, bias=options.bias) for _ in range(3))
        self.out_proj = Linear(inner, d_model, bias=options.out_bias)

    def heads_of(self, x: Tensor, projection: Linear) -> Tensor:
        """The projection of x (b l d_model), by heads (b l h d)."""
        return projection(x).unflatten(-1, (self.n_heads, self.head_dim))


def heads_of_width(mixer: str, d_model: int, head_dim: int, n_heads: int | None, option: str = "head_dim") -> int:
    """``n_heads`` if given, otherwise as many as fill d_model.

    Raises:
        ValueError: d_model cannot be filled; names the mixer and the option that gave ``head_dim``.
    """
    if n_heads is None and d_model % head_dim:
        raise ValueError(
            f"{mixer}: `{option}` must divide d_model, or `n_heads` be given; got {option}={head_dim} and "
            f"d_model={d_model}"
        )
    return d_model // head_dim if n_heads is None else n_heads
