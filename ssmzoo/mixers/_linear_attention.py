"""What mixers of linear attention have in common: the state, the op's call, projections by heads, gate and norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import causal_conv1d_step, linear_attention, linear_attention_step, rms_norm
from ssmkernels.core.crossing import whole_lengths
from ssmkernels.native.calls import Calls
from ssmzoo.linear import Linear, prepare_map
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve_each, depthwise
from ssmzoo.mixers._one_call import in_one_call
from ssmzoo.mixers._unit_values import matrix_of, unit_values
from ssmzoo.norm import GatedRMSNorm, RMSNorm
from ssmzoo.state import State

Activation = Literal["relu", "silu", "sigmoid", "gelu", "elu1"]


def elu1(x: Tensor) -> Tensor:
    """1 + elu(x), which is positive (Katharopoulos et al. 2020, arXiv 2006.16236, equation 7)."""
    return 1 + F.elu(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "elu1": elu1,
}


@dataclasses.dataclass
class LinearAttentionState(State):
    """The matrix of each head; how many tokens came before, where that matters; what convolutions remember."""

    S: Tensor  # (s, h, k, v), float32
    lengths: Tensor | None = None  # (s), int32
    convs: list[Tensor] = dataclasses.field(default_factory=list)  # (s, d_conv - 1, channels) each


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    S: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    bonus: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The op, or one token of it, which then writes into S; o (b l h v) and S after."""
    if S is not None and q.shape[1] == 1 and cu_seqlens is None and in_one_call(q):
        if log_decay is not None and log_decay.ndim > 1:
            log_decay = log_decay[:, 0]
        o = linear_attention_step(S, q[:, 0], k[:, 0], v[:, 0], log_decay, bonus=bonus, scale=scale)
        return o[:, None], S
    found = linear_attention(
        q,
        k,
        v,
        log_decay,
        bonus=bonus,
        scale=scale,
        initial_state=S,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return cast(tuple[Tensor, Tensor], found)


@torch.no_grad()
def xavier(*maps: nn.Module, gain: float = 2**-2.5) -> None:
    """Starts linear maps as RetNet and GLA do."""
    for each in maps:
        for name, weight in each.named_parameters():
            if weight.ndim == 2 and not weight.is_meta:
                nn.init.xavier_uniform_(weight, gain=gain)
            elif name.endswith("bias") and not weight.is_meta:
                weight.zero_()


@dataclasses.dataclass(kw_only=True)
class LinearAttentionOptions:
    """Options of RetNet and GLA.

    Attributes:
        expand_k: the keys of all heads together have expand_k · d_model channels.
        expand_v: their values have expand_v · d_model.
        n_heads: h.
        n_kv_heads: heads of keys and values, each for several queries; n_heads if None.
        feature_map: of queries and keys; elu1 is 1 + elu(x).
        use_short_conv: causal convolutions, with SiLU, of queries, keys and values.
        d_conv: their width.
        conv_bias: biases on them.
        use_output_gate: whether the normalised output is gated.
        gate_fn: the gate's activation; "swish" is SiLU.
        norm_eps: added to the mean of squares.
    """

    expand_k: float = 1.0
    expand_v: float = 2.0
    n_heads: int = 8
    n_kv_heads: int | None = None
    feature_map: Activation | None = None
    use_short_conv: bool = False
    d_conv: int = 4
    conv_bias: bool = False
    use_output_gate: bool = True
    gate_fn: Literal["swish", "sigmoid", "gelu", "relu"] = "swish"
    norm_eps: float = 1e-5


class LinearAttention(Mixer):
    """Queries, keys and values by heads, the recurrence, then a norm for each head and a gate.

    A subclass says how the state decays.
    """

    crosses_in_ops = True
    state_class = LinearAttentionState
    residual_projections = ("o_proj",)

    def __init__(self, d_model: int, o: LinearAttentionOptions):
        super().__init__(d_model)
        groups = o.n_heads if o.n_kv_heads is None else o.n_kv_heads
        self.check_at_least(1, n_heads=o.n_heads, n_kv_heads=groups, d_conv=o.d_conv)
        if o.n_heads % groups:
            raise ValueError(
                f"{type(self).__name__}: `n_kv_heads` must divide the {o.n_heads} heads, `n_heads`; got {groups}"
            )
        self.n_heads, self.n_kv_heads, self.options = o.n_heads, groups, o
        self.k_dim, self.v_dim = self._head_dim("expand_k", o.expand_k), self._head_dim("expand_v", o.expand_v)
        self.widths = (o.n_heads * self.k_dim, groups * self.k_dim, groups * self.v_dim)
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, width, bias=False) for width in self.widths)
        if o.use_short_conv:
            for name, width in zip("qkv", self.widths, strict=True):
                self.add_module(f"{name}_conv1d", depthwise(width, o.d_conv, o.conv_bias))
        if o.use_output_gate:
            self.g_proj = Linear(d_model, o.n_heads * self.v_dim, bias=False)
        self.fused = o.use_output_gate and o.gate_fn == "swish"
        if self.fused:
            self.g_norm_swish_gate = GatedRMSNorm(self.v_dim, o.norm_eps, norm_before_gate=True)
        else:
            self.g_norm = RMSNorm(self.v_dim, o.norm_eps)
        self.o_proj = Linear(o.n_heads * self.v_dim, d_model, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        """Of x (b l d_model): what the op takes."""
        raise NotImplementedError

    def placed(
        self, q: Tensor, k: Tensor, state: LinearAttentionState | None, cu_seqlens: Tensor | None
    ) -> list[Tensor]:
        """Queries and keys as they depend on their positions."""
        return [q, k]

    def initial_state(self, batch_size: int, max_length: int | None = None) -> LinearAttentionState:
        new, o = self.like(wide=True).new_zeros, self.options
        widths = self.widths if o.use_short_conv else ()
        return LinearAttentionState(
            S=new(batch_size, self.n_heads, self.k_dim, self.v_dim),
            convs=[new(batch_size, o.d_conv - 1, width) for width in widths],
        )

    def mixing_flops(self, context: int) -> float:
        """Five for each number of the state, two for each tap."""
        taps = 2 * self.options.d_conv * sum(self.widths) if self.options.use_short_conv else 0
        return 5 * self.n_heads * self.k_dim * self.v_dim + taps

    def mix(
        self, x: Tensor, state: LinearAttentionState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearAttentionState | None]:
        y, after = self._read(x, None, state, cu_seqlens)
        return self.o_proj(self._gated(y, x).flatten(2)), after

    def matrix(self, x: Tensor) -> Tensor:
        return matrix_of(self._read(x, unit_values(x, self.n_kv_heads), None, None)[0])

    def _read(
        self, x: Tensor, values: Tensor | None, state: LinearAttentionState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearAttentionState | None]:
        """Outputs of the heads (b l h v) before norm and gate, from other values than x's own if they are given."""
        o = self.options
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        after = None if state is None else dataclasses.replace(state)
        if o.use_short_conv:
            convs = [self.get_submodule(f"{name}_conv1d") for name in "qkv"]
            before = None if state is None else state.convs
            projected, conv_states = convolve_each(convs, projected, o.d_conv, "silu", before, cu_seqlens)
            if after is not None:
                after.convs = conv_states
        dims = (self.k_dim, self.k_dim, self.v_dim)
        q, k, v = (t.unflatten(-1, (-1, dim)) for t, dim in zip(projected, dims, strict=True))
        if o.feature_map is not None:
            q, k = ACTIVATIONS[o.feature_map](q), ACTIVATIONS[o.feature_map](k)
        q, k = (t.to(v.dtype) for t in self.placed(q, k, state, cu_seqlens))
        v = v if values is None else values
        k, v, log_decay = self.spread(k), self.spread(v), self.log_decay(x)
        y, S = attend(q, k, v, log_decay, None if state is None else state.S, cu_seqlens)
        if after is not None:
            after.S = S
            if after.lengths is not None:
                new = x.shape[1] if cu_seqlens is None else whole_lengths(cu_seqlens).to(after.lengths.dtype)
                in_place = state is not None and S is state.S  # as the step leaves it
                after.lengths = after.lengths.add_(new) if in_place else after.lengths + new
        return y, after

    def prepare_recall(
        self,
        calls: Calls,
        x: Tensor,
        state: LinearAttentionState,
        log_decay: Callable[[], Tensor],
        placed: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """What a subclass's ``prepare_step`` does, given what adds the calls of its :meth:`log_decay`.

        ``placed`` adds those of its :meth:`placed`, ``(b, h, k)`` → ``(b, h, k)``.
        """
        o, m = self.options, self._modules
        norm, convs = m.get("g_norm_swish_gate"), [m[f"{name}_conv1d"] for name in "qkv" if o.use_short_conv]
        if norm is None or self.n_kv_heads != self.n_heads:
            return None
        if not in_one_call(x, *convs, norm=norm):
            return None
        q, k, v, gate = (prepare_map(calls, m[f"{name}_proj"], x) for name in "qkvg")
        if o.use_short_conv:
            q, k, v = (
                calls.op(causal_conv1d_step, before, t, conv.weight.squeeze(1), conv.bias, "silu")
                for before, t, conv in zip(state.convs, (q, k, v), cast(list[nn.Conv1d], convs), strict=True)
            )
        if o.feature_map is not None:
            q, k = calls.activated(q, o.feature_map), calls.activated(k, o.feature_map)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v))
        if placed is not None:
            q, k = placed(q), placed(k)
        if state.lengths is not None:
            calls.count(state.lengths)
        y = calls.op(linear_attention_step, state.S, q, k, v, log_decay())
        gated = calls.op(
            rms_norm, y, norm.weight, eps=norm.eps, gate=gate.view_as(y), norm_before_gate=norm.norm_before_gate
        )
        return prepare_map(calls, m["o_proj"], gated.flatten(1))

    def spread(self, t: Tensor) -> Tensor:
        """(b l n_kv_heads …) → (b l n_heads …): what several heads share."""
        return t if self.n_kv_heads == self.n_heads else t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2)

    def _gated(self, y: Tensor, x: Tensor) -> Tensor:
        """The norm for each head of y (b l h v), and the gate."""
        gate = self.g_proj(x).unflatten(-1, (self.n_heads, self.v_dim)) if self.options.use_output_gate else None
        if gate is None:
            return self.g_norm(y)
        if self.fused:
            return self.g_norm_swish_gate(y, gate)
        return self.g_norm(y) * ACTIVATIONS[self.options.gate_fn](gate)

    def _head_dim(self, name: str, expand: float) -> int:
        total = round(expand * self.d_model)
        if total < 1 or abs(total - expand * self.d_model) > 1e-6 or total % self.n_heads:
            raise ValueError(
                f"{type(self).__name__}: `{name}` · d_model must be whole channels for each of the {self.n_heads} "
                f"heads; got {expand} · {self.d_model}"
            )
        return total // self.n_heads
