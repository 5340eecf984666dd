"""Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464), the mixer of Qwen3-Next and OLMo-Hybrid.

Glossary: b batch, l length, h heads of values, g heads of queries and keys, k and v channels of a head. For x
(b l d_model)::

    q, k, v = silu(conv1d(q_proj x)), …                 (b l g k) twice, (b l h v); causal, over d_conv tokens
    q, k    = q / |q|, k / |k|
    β       = σ(b_proj x)                               (b l h), twice that with allow_neg_eigval
    log α   = -exp(A_log) softplus(a_proj x + dt_bias)  (b l h)
    S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ   (b h k v), the state; scalars commute with the rest
    o_t = S_tᵀ q_t / √k                                 (b l h v)
    out = o_proj(rms(o) · silu(g_proj x))               (b l d_model), a norm for each head

Against Mamba-2, whose state only decays, a token first erases what the state holds for its key. Against DeltaNet, all
of the state can be forgotten at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import gated_deltanet_step
from ssmkernels.core.finite import finite_exp
from ssmkernels.core.validate import precision
from ssmkernels.native.calls import Calls
from ssmzoo.linear import Linear, prepare_map
from ssmzoo.mixers._delta import DeltaMixer, DeltaState
from ssmzoo.mixers._delta_options import DecayingOptions
from ssmzoo.mixers._one_call import in_one_call
from ssmzoo.norm import GatedRMSNorm
from ssmzoo.registry import register_mixer

# Linear maps and convolutions whose weights gated_deltanet_step takes.
MAPS = (
    *("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj", "o_proj"),
    *("q_conv1d", "k_conv1d", "v_conv1d"),
)


@dataclasses.dataclass(kw_only=True)
class GatedDeltaNetOptions(DecayingOptions):
    """Options of gated DeltaNet, beside those of :class:`DecayingOptions`.

    Attributes:
        use_gate: whether the normalised output is gated.
    """

    use_gate: bool = True


@register_mixer("gated_deltanet")
class GatedDeltaNet(DeltaMixer):
    """Gated delta rule: an associative memory that forgets, and replaces what it holds for a key.

    The options are those of :class:`GatedDeltaNetOptions`; the names of the weights are those of flash-linear-attention
    and OLMo-Hybrid. ``A_log`` and ``dt_bias`` stay float32. With ``n_heads=16, n_v_heads=32, head_dim=128, expand_v=1``
    it is Qwen3-Next's; with ``allow_neg_eigval=True`` OLMo-Hybrid's.
    """

    options_class: ClassVar[type] = GatedDeltaNetOptions

    def __init__(self, d_model: int, **options: Any):
        o = self.options_class(**options)
        super().__init__(
            d_model, o, head_k_dim=o.head_dim, head_v_dim=self.value_dim(o), n_v_heads=o.n_v_heads, steps=self.writes(o)
        )
        self.a_proj = Linear(d_model, self.n_v_heads, bias=False) if self.decays(o) else None
        if self.a_proj is not None:
            self.add_decay(o, self.n_v_heads)
        self.add_output_gate(o.use_gate, o.norm_eps)
        # Whether gated_deltanet_step is this layer
        self.whole = self.steps == 1 and self.a_proj is not None and o.use_gate and o.use_short_conv and not o.conv_bias

    @classmethod
    def writes(cls, o: Any) -> int:
        """Steps of the delta rule for each token."""
        return 1

    @classmethod
    def decays(cls, o: Any) -> bool:
        return True

    def mix(self, x: Tensor, state: DeltaState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, DeltaState | None]:
        if state is not None and x.shape[1] == 1 and cu_seqlens is None and self.whole and self._in_one_call(x):
            return self._whole_step(x, state), state
        return super().mix(x, state, cu_seqlens)

    def _in_one_call(self, x: Tensor) -> bool:
        maps = [self._modules[name] for name in MAPS]
        return in_one_call(x, *maps, norm=self._modules["o_norm"]) and all(m is None or m.bias is None for m in maps)

    def _whole_step(self, x: Tensor, state: DeltaState) -> Tensor:
        """One token of the layer in one call, which gives the same: (b 1 d_model) → (b 1 d_model)."""
        arguments, options = self._of_step(x[:, 0], state)
        return gated_deltanet_step(*arguments, **options)[:, None]

    def prepare_step(self, calls: Calls, x: Tensor, state: DeltaState) -> Tensor | None:
        if self.whole and self._in_one_call(x):
            arguments, options = self._of_step(x, state)
            return calls.op(gated_deltanet_step, *arguments, **options)

        def log_decay() -> Tensor | None:
            if self.a_proj is None:
                return None
            a, A = prepare_map(calls, self.a_proj, x), calls.activated(self.A_log[None], "finite_exp")
            return calls.activated(a, "softplus", bias=self.dt_bias, scale=-1.0, factor=A)

        return self.prepare_recall(calls, x, state, log_decay)

    def _of_step(self, x: Tensor, state: DeltaState) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of :func:`ssmkernels.gated_deltanet_step`, and its options."""
        weights = {name: cast(nn.Linear, self._modules[name]).weight for name in MAPS}
        norm = cast(GatedRMSNorm, self.o_norm)
        arguments = (
            *state.convs,
            state.S,
            x,
            weights["q_proj"],
            weights["k_proj"],
            weights["v_proj"],
            weights["g_proj"],
            weights["b_proj"],
            weights["a_proj"],
            weights["q_conv1d"].squeeze(1),
            weights["k_conv1d"].squeeze(1),
            weights["v_conv1d"].squeeze(1),
            self.A_log,
            self.dt_bias,
            norm.weight,
            weights["o_proj"],
        )
        return arguments, {"beta_scale": self.most_beta, "norm_eps": norm.eps}

    def log_decay(self, x: Tensor) -> Tensor | None:
        if self.a_proj is None:
            return None
        a = self.a_proj(x)
        return -finite_exp(self.A_log) * F.softplus(a.to(precision(a)) + self.dt_bias, threshold=40)
