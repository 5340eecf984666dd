"""What the mixers of the delta rule have in common: projections, short convolutions, the state, norm and gate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssmkernels import causal_conv1d_step, delta_rule, delta_rule_step, rms_norm
from ssmkernels.native.calls import Calls, NotPreparedError
from ssmzoo.init import inverse_softplus_of_log_uniform, starting, wide_dtype
from ssmzoo.linear import Linear, is_plain, prepare_map
from ssmzoo.mixer import Mixer
from ssmzoo.mixers._convolution import convolve, depthwise
from ssmzoo.mixers._delta_options import DecayingOptions, DeltaOptions
from ssmzoo.mixers._one_call import in_one_call
from ssmzoo.mixers._unit_values import matrix_of, unit_values
from ssmzoo.norm import GatedRMSNorm, RMSNorm
from ssmzoo.state import State

L2_EPS = 1e-6  # added to the sum of squares of a query or key


@dataclasses.dataclass
class DeltaState(State):
    """The matrix of each head, and what the convolutions remember."""

    S: Tensor  # (s, h, k, v), float32
    convs: list[Tensor]  # of q, k and v: (s, d_conv - 1, channels) each


def l2_normalised(x: Tensor) -> Tensor:
    """x / √(Σ x² + 1e-6) over the last axis, which is a root mean square norm with other constants."""
    weight, eps = l2_norm(x)
    return cast(Tensor, rms_norm(x, weight, eps=eps))


def l2_norm(x: Tensor, eps: float = L2_EPS) -> tuple[Tensor, float]:
    """The weight and ε of the root mean square norm that is x / √(Σ x² + eps) over the last axis."""
    k = x.shape[-1]
    return x.new_full((k,), k**-0.5), eps / k


class DeltaMixer(Mixer):
    """Queries, keys and values through short convolutions, the delta rule, then a norm for each head and a gate.

    A subclass calls :meth:`add_output_gate`, or has its own :meth:`finish`, and says how the state decays.

    Args:
        d_model: width of input and output.
        o: the options.
        head_k_dim, head_v_dim: channels of a head.
        n_v_heads: heads of values; as many as of keys if None.
        use_beta: β is learned; otherwise it is what it may be at most.
        steps: writes of a token, each with a key, a value and a β of its own.
    """

    crosses_in_ops = True
    state_class = DeltaState
    residual_projections = ("o_proj",)

    def __init__(
        self,
        d_model: int,
        o: DeltaOptions,
        *,
        head_k_dim: int,
        head_v_dim: int,
        n_v_heads: int | None = None,
        use_beta: bool = True,
        steps: int = 1,
    ):
        super().__init__(d_model)
        h = o.n_heads if n_v_heads is None else n_v_heads
        self.check_at_least(1, n_heads=o.n_heads, n_v_heads=h, d_conv=o.d_conv)
        if h % o.n_heads:
            raise ValueError(
                f"{type(self).__name__}: `n_v_heads` must be a multiple of the {o.n_heads} heads of queries and keys, "
                f"`n_heads`; got {h}"
            )
        self.n_heads, self.n_v_heads, self.head_k_dim, self.head_v_dim = o.n_heads, h, head_k_dim, head_v_dim
        self.d_conv, self.steps, self.most_beta = o.d_conv, steps, 2.0 if o.allow_neg_eigval else 1.0
        k, v = self.n_heads * head_k_dim, h * head_v_dim
        self.widths = (k, k * steps, v * steps)
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, width, bias=False) for width in self.widths)
        self.b_proj = Linear(d_model, h * steps, bias=False) if use_beta else None
        self.use_short_conv = o.use_short_conv
        if o.use_short_conv:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (depthwise(n, o.d_conv, o.conv_bias) for n in self.widths)
        self.o_proj = Linear(v, d_model, bias=False)

    @classmethod
    def value_dim(cls, o: DecayingOptions) -> int:
        """Channels of a value, of :class:`DecayingOptions`."""
        size = o.expand_v * o.head_dim if o.head_v_dim is None else o.head_v_dim
        if o.head_dim < 1 or size < 1 or size != round(size):
            raise ValueError(
                f"{cls.__name__}: `head_dim` and `expand_v` · head_dim, or `head_v_dim`, must be whole numbers of "
                f"channels; got {o.head_dim} and {size:g}"
            )
        return round(size)

    def add_decay(self, o: DecayingOptions, channels: int) -> None:
        """Weights of a decay made of exp(A_log) for each head and ``dt_bias`` for so many channels."""
        name, h, wide, (low, high) = type(self).__name__, self.n_v_heads, wide_dtype(), o.A_init_range
        if not 0 <= low <= high < math.inf or high == 0:
            raise ValueError(
                f"{name}: `A_init_range` must be (least, most) with 0 <= least <= most; got {o.A_init_range}"
            )
        if not 0 < o.dt_min <= o.dt_max:
            raise ValueError(f"{name}: 0 < `dt_min` <= `dt_max` must hold; got {o.dt_min} and {o.dt_max}")
        least = max(low, torch.finfo(wide).tiny)  # the logarithm of 0 is -inf
        A = starting(h, wide, lambda: torch.empty(h, dtype=wide).uniform_(low, high).clamp(min=least).log())
        self.A_log = nn.Parameter(A)
        self.dt_bias = nn.Parameter(inverse_softplus_of_log_uniform(channels, o.dt_min, o.dt_max, o.dt_init_floor))
        self.float32_parameters = self.no_weight_decay = ("A_log", "dt_bias")

    def add_output_gate(self, use_gate: bool, norm_eps: float) -> None:
        """A norm for each head, ``o_norm``, and with ``use_gate`` the map ``g_proj`` of a gate that passes SiLU."""
        if use_gate:
            self.g_proj: nn.Module | None = Linear(self.d_model, self.n_v_heads * self.head_v_dim, bias=False)
            self.o_norm: nn.Module = GatedRMSNorm(self.head_v_dim, norm_eps, norm_before_gate=True)
        else:
            self.g_proj, self.o_norm = None, RMSNorm(self.head_v_dim, norm_eps)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Of x (b l d_model): (b l h) or (b l h k) in the precision of sums, or None."""
        return None

    def activated(self, x: Tensor) -> Tensor:
        """Queries or keys after their convolution, (b l h k)."""
        return l2_normalised(x)

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """o (b l h v) after norm and gate; x is the layer's input."""
        return self.o_norm(o) if self.g_proj is None else self.o_norm(o, self.g_proj(x).view_as(o))

    def initial_state(self, batch_size: int, max_length: int | None = None) -> DeltaState:
        new = self.like(wide=True).new_zeros
        widths = self.widths if self.use_short_conv else ()
        return DeltaState(
            S=new(batch_size, self.n_v_heads, self.head_k_dim, self.head_v_dim),
            convs=[new(batch_size, self.d_conv - 1, width) for width in widths],
        )

    def mixing_flops(self, context: int) -> float:
        """Seven for each write and number of the state, two for each tap."""
        taps = 2 * self.d_conv * sum(self.widths) if self.use_short_conv else 0
        return 7 * self.steps * self.n_v_heads * self.head_k_dim * self.head_v_dim + taps

    def mix(self, x: Tensor, state: DeltaState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, DeltaState | None]:
        o, S, convs = self._read(x, None, state, cu_seqlens)
        y = self.o_proj(self.finish(o, x).flatten(2))
        return y, None if state is None else DeltaState(S, convs)

    def matrix(self, x: Tensor) -> Tensor:
        if self.steps > 1:
            return super().matrix(x)
        return matrix_of(self._read(x, unit_values(x, self.n_v_heads), None, None)[0])

    def prepare_recall(
        self,
        calls: Calls,
        x: Tensor,
        state: DeltaState,
        log_decay: Callable[[], Tensor | None],
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """What a subclass's ``prepare_step`` does, given what adds the calls of :meth:`log_decay` and of
        :meth:`finish`, the latter ``(b, h, v)`` → ``(b, h v)``, if it has one of its own.
        """
        m = self._modules
        convs = [cast(nn.Conv1d, m[f"{name}_conv1d"]) for name in "qkv" if self.use_short_conv]
        if self.b_proj is None or self.steps > 1 or not in_one_call(x, *convs):
            return None
        q, k, v = (prepare_map(calls, m[f"{name}_proj"], x) for name in "qkv")
        if self.use_short_conv:
            q, k, v = (
                calls.op(causal_conv1d_step, before, t, conv.weight.squeeze(1), conv.bias, self.activation_of(name))
                for name, before, t, conv in zip("qkv", state.convs, (q, k, v), convs, strict=True)
            )
        else:
            q, k, v = (
                calls.activated(t, self.activation_of(name) or "identity")
                for name, t in zip("qkv", (q, k, v), strict=True)
            )
        weight, eps = l2_norm(q.unflatten(-1, (-1, self.head_k_dim)))
        q, k = (calls.op(rms_norm, t.unflatten(-1, (-1, self.head_k_dim)), weight, eps=eps) for t in (q, k))
        beta = calls.activated(prepare_map(calls, self.b_proj, x), "sigmoid", scale=self.most_beta)
        o = calls.op(delta_rule_step, state.S, q, k, v.unflatten(-1, (-1, self.head_v_dim)), beta, log_decay())
        return prepare_map(calls, m["o_proj"], self._prepare_finish(calls, x, o) if finish is None else finish(o))

    def _prepare_finish(self, calls: Calls, x: Tensor, o: Tensor) -> Tensor:
        norm = cast(RMSNorm | GatedRMSNorm, self._modules["o_norm"])
        if not is_plain(norm, kinds=(RMSNorm, GatedRMSNorm)):
            raise NotPreparedError(type(norm).__name__)
        gate = {}
        if self.g_proj is not None:
            gate = {"gate": prepare_map(calls, self.g_proj, x).view_as(o), "norm_before_gate": True}
        return calls.op(rms_norm, o, norm.weight, eps=norm.eps, **gate).flatten(1)

    def _read(
        self, x: Tensor, values: Tensor | None, state: DeltaState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Outputs of the heads (b l h v), from other values than x's own if they are given; and the state after."""
        (q, k, v), convs = self._projected(x, state, cu_seqlens)
        q, k = (self.activated(t.unflatten(-1, (-1, self.head_k_dim))) for t in (q, k))
        v = v.unflatten(-1, (-1, self.head_v_dim)) if values is None else values
        beta = self._beta(x, v)
        S = None if state is None else state.S
        log_decay, n = self.log_decay(x), self.steps
        if n == 1:
            return *recall(q, k, v, beta, log_decay, S, cu_seqlens), convs
        o, S = recall(*in_steps(n, q, k, v, beta, log_decay), S, None if cu_seqlens is None else cu_seqlens * n)
        return o[:, n - 1 :: n], S, convs

    def _projected(
        self, x: Tensor, state: DeltaState | None, cu_seqlens: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """q, k and v, and the states of their convolutions."""
        ys, after = [], []
        for i, name in enumerate("qkv"):
            y, activation = self.get_submodule(f"{name}_proj")(x), self.activation_of(name)
            if self.use_short_conv:
                before = None if state is None else state.convs[i]
                conv = self.get_submodule(f"{name}_conv1d")
                y, last = convolve(conv, y, self.d_conv, activation, before, cu_seqlens)
                after.append(last)
            elif activation == "silu":
                y = F.silu(y)
            ys.append(y)
        return ys, after

    def activation_of(self, name: str) -> Literal["silu"] | None:
        """What follows the convolution of q, k or v."""
        return "silu"

    def _beta(self, x: Tensor, v: Tensor) -> Tensor:
        """(b l h), in the dtype of v (b l h v)."""
        if self.b_proj is None:
            return v.new_full(v.shape[:3], self.most_beta)
        beta = torch.sigmoid(self.b_proj(x)).to(v.dtype)
        return beta if self.most_beta == 1 else self.most_beta * beta


def in_steps(
    n: int, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Each token as n of the delta rule: the first decays, all write, the last reads."""
    k, v, beta = (rearrange(t, "b l (n h) ... -> b (l n) h ...", n=n) for t in (k, v, beta))
    q = torch.stack([*[torch.zeros_like(q)] * (n - 1), q], dim=2).flatten(1, 2)
    if log_decay is not None:
        log_decay = torch.stack([log_decay, *[torch.zeros_like(log_decay)] * (n - 1)], dim=2).flatten(1, 2)
    return q, k, v, beta, log_decay


def recall(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    S: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op, or one token of it, which then writes into S; o (b l h v) and S after."""
    if S is not None and q.shape[1] == 1 and cu_seqlens is None and in_one_call(q):
        decay = None if log_decay is None else log_decay[:, 0]
        return delta_rule_step(S, q[:, 0], k[:, 0], v[:, 0], beta[:, 0], decay)[:, None], S
    found = delta_rule(q, k, v, beta, log_decay, initial_state=S, return_final_state=True, cu_seqlens=cu_seqlens)
    return cast(tuple[Tensor, Tensor], found)
