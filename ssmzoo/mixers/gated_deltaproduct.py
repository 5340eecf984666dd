"""Gated DeltaProduct (Siems et al. 2025, arXiv 2502.10297): several steps of the delta rule for each token.

Letters are those of :mod:`ssmzoo.mixers.gated_deltanet`. A token has n = n_householder keys, values and β. Its state
decays once, then each of them writes in turn, and the query reads after the last::

    S = α_t S_{t-1};   S = (I - β_{t,i} k_{t,i} k_{t,i}ᵀ) S + β_{t,i} k_{t,i} v_{t,i}ᵀ   for i = 1 … n;   S_t = S

The transition is a product of n generalised Householder matrices: with n = 2 and β up to 2 it can turn the state in a
plane, and in general permute n + 1 entries, which one step cannot.
"""

from __future__ import annotations

import dataclasses

from ssmzoo.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetOptions
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class GatedDeltaProductOptions(GatedDeltaNetOptions):
    """Options of gated DeltaProduct, beside those of :class:`GatedDeltaNetOptions`.

    Attributes:
        n_householder: n, writes of a token.
        use_forget_gate: whether the state decays.
    """

    n_householder: int = 2
    use_forget_gate: bool = True
    allow_neg_eigval: bool = True


@register_mixer("gated_deltaproduct")
class GatedDeltaProduct(GatedDeltaNet):
    """Gated delta rule with several writes a token, whose product tracks more of a state than one can.

    The options are those of :class:`GatedDeltaProductOptions`; the names of the weights are those of
    flash-linear-attention.
    """

    options_class = GatedDeltaProductOptions

    @classmethod
    def writes(cls, o: GatedDeltaProductOptions) -> int:
        if o.n_householder < 1:
            raise ValueError(f"{cls.__name__}: `n_householder` must be at least 1; got {o.n_householder}")
        return o.n_householder

    @classmethod
    def decays(cls, o: GatedDeltaProductOptions) -> bool:
        return o.use_forget_gate
