"""xLSTM's matrix memory as in xLSTM-7B (Beck et al. 2025, arXiv 2503.13427, section 3).

Glossary:

    b: batch    l: length    h: heads    k, v: head dims of keys and values

One layer, for u (b l d_model)::

    q, k, v = maps of u                               (b l h k) twice, (b l h v)
    i, f    = cap · tanh(maps of u / cap)             (b l h), the gates before exp and σ
    y       = the matrix memory of q, k, v, i, f      :func:`ssmkernels.mlstm`
    out     = out_proj(σ(o) · norm(y)),  o a map of u   the norm is over each head's channels

Against the block of the first paper (:mod:`ssmzoo.mixers.mlstm_v1`) it has no convolution and no up-projection: the
block has an MLP after it instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmkernels import mlstm_step
from ssmkernels.native.calls import Calls
from ssmzoo.init import starting, wide_dtype
from ssmzoo.linear import Linear, WideBiasLinear, prepare_map
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._matrix_memory import MemoryState, remember
from ssmzoo.mixers._xlstm import small_init
from ssmzoo.norm import HeadLayerNorm, prepare_head_norm
from ssmzoo.registry import register_mixer


@register_mixer("mlstm")
class MLSTM(Mixer):
    """Matrix memory with an exponential input gate, from xLSTM.

    Args:
        d_model: width of input and output.
        n_heads: h, heads.
        qk_dim_factor: all heads' queries have qk_dim_factor · d_model channels together, and so have keys.
        v_dim_factor: likewise for values, and for the output gate.
        gate_soft_cap: bounds i and f before their activations smoothly to ± gate_soft_cap; 0 for none.
        igate_bias_init: the input gate's bias starts there.
        fgate_bias_range: the heads' biases of the forget gate start evenly spaced in it.
        bias: biases on all maps, and on the norm; the gates have theirs anyway.
        norm_eps: added to the variance within each head.

    The names of its weights are those of xLSTM-7B. The biases of the gates i and f stay float32. All gates' weights
    start at 0, as published.
    """

    crosses_in_ops = True
    state_class = MemoryState
    float32_parameters = ("igate_preact.bias", "fgate_preact.bias")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 8,
        qk_dim_factor: float = 0.5,
        v_dim_factor: float = 1.0,
        gate_soft_cap: float = 15.0,
        igate_bias_init: float = -10.0,
        fgate_bias_range: tuple[float, float] = (3.0, 6.0),
        bias: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__(d_model)
        self.check_at_least(1, n_heads=n_heads)
        self.check_at_least(0, gate_soft_cap=gate_soft_cap)
        self.n_heads, self.gate_soft_cap = n_heads, gate_soft_cap
        self.k_dim, self.v_dim = self._width("qk_dim_factor", qk_dim_factor), self._width("v_dim_factor", v_dim_factor)
        self.q, self.k = (Linear(d_model, self.k_dim, bias=bias) for _ in range(2))
        self.v, self.ogate_preact = (Linear(d_model, self.v_dim, bias=bias) for _ in range(2))
        self.igate_preact, self.fgate_preact = (WideBiasLinear(d_model, n_heads) for _ in range(2))
        self.multihead_norm = HeadLayerNorm(self.v_dim, n_heads, norm_eps, bias=bias)
        self.out_proj = Linear(self.v_dim, d_model, bias=bias)
        self._start(igate_bias_init, fgate_bias_range)

    def _width(self, option: str, factor: float) -> int:
        width = int(self.d_model * factor)
        if width < 1 or width % self.n_heads:
            raise ValueError(
                f"MLSTM: `{option}` must give each of the {self.n_heads} heads as many channels; got {factor} of "
                f"{self.d_model}, {width} channels"
            )
        return width

    @torch.no_grad()
    def _start(self, input_bias: float, forget_bias: tuple[float, float]) -> None:
        for linear in (self.q, self.k, self.v):
            small_init(linear.weight, self.d_model)
        for gate in (self.ogate_preact, self.igate_preact, self.fgate_preact):
            gate.weight.zero_()
        dtype, h = wide_dtype(), self.n_heads
        self.igate_preact.bias = nn.Parameter(starting(h, dtype, lambda: torch.full((h,), input_bias, dtype=dtype)))
        self.fgate_preact.bias = nn.Parameter(starting(h, dtype, lambda: torch.linspace(*forget_bias, h, dtype=dtype)))

    def initial_state(self, batch_size: int, max_length: int | None = None) -> MemoryState:
        h = self.n_heads
        return MemoryState.empty(self.like(wide=True), batch_size, h, self.k_dim // h, self.v_dim // h)

    def mixing_flops(self, context: int) -> float:
        """Five for each number of the memory: the decay, the outer product, the output."""
        return 5.0 * self.k_dim * self.v_dim / self.n_heads

    def mix(self, x: Tensor, state: MemoryState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, MemoryState | None]:
        q, k, v = (linear(x).unflatten(-1, (self.n_heads, -1)) for linear in (self.q, self.k, self.v))
        i, f = (self._capped(gate(x)) for gate in (self.igate_preact, self.fgate_preact))
        y, state = remember(q, k, v, i, f, state, cu_seqlens)
        return self.out_proj(torch.sigmoid(self.ogate_preact(x)) * self.multihead_norm(y)), state

    def _capped(self, gate: Tensor) -> Tensor:
        gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
        return gate if not self.gate_soft_cap else self.gate_soft_cap * torch.tanh(gate / self.gate_soft_cap)

    def prepare_step(self, calls: Calls, x: Tensor, state: MemoryState) -> Tensor | None:
        cap, heads = self.gate_soft_cap, (self.n_heads, -1)
        q, k, v = (prepare_map(calls, linear, x).unflatten(-1, heads) for linear in (self.q, self.k, self.v))
        i, f = (prepare_map(calls, gate, x) for gate in (self.igate_preact, self.fgate_preact))
        if cap:
            i, f = (calls.activated(gate, "tanh", slope=1 / cap, scale=cap) for gate in (i, f))
        y = prepare_head_norm(
            calls, self.multihead_norm, calls.op(mlstm_step, (state.C, state.n, state.m), q, k, v, i, f)
        )
        gated = calls.activated(prepare_map(calls, self.ogate_preact, x), "sigmoid", factor=y)
        return prepare_map(calls, self.out_proj, gated)
