"""Options that the mixers of the delta rule share."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(kw_only=True)
class DeltaOptions:
    """Options of all mixers of the delta rule.

    Attributes:
        n_heads: heads of queries and keys.
        use_short_conv: causal convolutions of queries, keys and values.
        d_conv: their width.
        conv_bias: biases on them.
        allow_neg_eigval: β goes to 2 rather than 1, so that a token may reflect the state (arXiv 2411.12537).
        norm_eps: added to the output's mean of squares.
    """

    n_heads: int = 6
    use_short_conv: bool = True
    d_conv: int = 4
    conv_bias: bool = False
    allow_neg_eigval: bool = False
    norm_eps: float = 1e-5


@dataclasses.dataclass(kw_only=True)
class DecayingOptions(DeltaOptions):
    """Options where the state decays.

    Attributes:
        n_v_heads: heads of values, a multiple of ``n_heads``, which share queries and keys; as many if None.
        head_dim: channels of a query or key.
        expand_v: a value has expand_v · head_dim channels.
        head_v_dim: channels of a value; by ``expand_v`` if None.
        A_init_range: exp(A_log) starts uniform in it.
        dt_min, dt_max, dt_init_floor: softplus(dt_bias) starts log-uniform between the first two, and not below the
            third.
    """

    n_v_heads: int | None = None
    head_dim: int = 256
    expand_v: float = 2.0
    head_v_dim: int | None = None
    A_init_range: tuple[float, float] = (0.0, 16.0)
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
