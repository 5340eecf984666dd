"""DeltaNet (Schlag et al. 2021, arXiv 2102.11174; made parallel over time by Yang et al. 2024, arXiv 2406.06484).

Glossary: b batch, l length, h heads, k and v channels of a head. For x (b l d_model)::

    q, k, v = silu(conv1d(q_proj x)), …              (b l h k) twice, (b l h v); causal, over d_conv tokens
    q, k    = q / |q|, k / |k|
    β       = σ(b_proj x)                            (b l h), twice that with allow_neg_eigval
    S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ    (b h k v), the state
    o_t = S_tᵀ q_t / √k                              (b l h v)
    out = o_proj(rms(o))                             (b l d_model), a norm for each head
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from ssmkernels.native.calls import Calls
from ssmzoo.mixers._delta import DeltaMixer, DeltaState, l2_normalised
from ssmzoo.mixers._delta_options import DeltaOptions
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class DeltaNetOptions(DeltaOptions):
    """Options of DeltaNet, beside those of :class:`DeltaOptions`.

    Attributes:
        expand_k, expand_v: keys and values of all heads together have expand_k · d_model and expand_v · d_model
            channels.
        use_beta: β is learned; otherwise it is 1, or 2.
        use_gate: whether the normalised output is gated.
        qk_activation: of queries and keys; "elu" is 1 + elu(x).
        qk_norm: queries and keys are divided by their Euclidean norm, or by the sum of their channels.
    """

    n_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    use_beta: bool = True
    use_gate: bool = False
    qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"
    qk_norm: Literal["l2", "sum"] = "l2"


@register_mixer("deltanet")
class DeltaNet(DeltaMixer):
    """Delta rule: an associative memory in which a token replaces what is held for its key.

    The options are those of :class:`DeltaNetOptions`; the names of the weights are those of flash-linear-attention.
    """

    options_class = DeltaNetOptions

    def __init__(self, d_model: int, **options: Any):
        o = DeltaNetOptions(**options)
        super().__init__(
            d_model,
            o,
            head_k_dim=self._head_dim("expand_k", o.expand_k, d_model, o.n_heads),
            head_v_dim=self._head_dim("expand_v", o.expand_v, d_model, o.n_heads),
            use_beta=o.use_beta,
        )
        self.qk_activation, self.qk_norm = o.qk_activation, o.qk_norm
        self.add_output_gate(o.use_gate, o.norm_eps)

    @classmethod
    def _head_dim(cls, name: str, expand: float, d_model: int, n_heads: int) -> int:
        total = expand * d_model
        if n_heads < 1 or total < 1 or total != round(total) or round(total) % n_heads:
            raise ValueError(
                f"{cls.__name__}: `{name}` · d_model must be whole channels for each of the {n_heads} heads; got "
                f"{expand} · {d_model}"
            )
        return round(total) // n_heads

    def activation_of(self, name: str) -> Literal["silu"] | None:
        return "silu" if name == "v" or self.qk_activation == "silu" else None

    def activated(self, x: Tensor) -> Tensor:
        if self.qk_activation == "relu":
            x = F.relu(x)
        elif self.qk_activation == "elu":
            x = 1 + F.elu(x)
        return l2_normalised(x) if self.qk_norm == "l2" else x / x.sum(-1, keepdim=True)

    def prepare_step(self, calls: Calls, x: Tensor, state: DeltaState) -> Tensor | None:
        if self.qk_activation not in ("silu", "identity") or self.qk_norm != "l2":
            return None
        return self.prepare_recall(calls, x, state, lambda: None)
