"""RWKV-7's time mixing, Goose (Peng et al. 2025, arXiv 2503.14456, section 4).

Glossary: b batch, l length, d: d_model, h heads of n: head_dim channels. For x (b l d), with ∘ products of channels and
σ the sigmoid::

    x^s_t = x_t + (x_{t-1} - x_t) ∘ x_s                        s one of r, w, k, v, a, g: six token shifts
    r, k, v = r_proj(x^r), k_proj(x^k), v_proj(x^v)            (b l d) each
    log w = -e^(-1/2) σ(w_lora(x^w))                           the decay
    α = σ(a_lora(x^a))                                         the in-context learning rate
    v = v + (v_first - v) ∘ σ(v_lora(x^v))                     the value residual; v_first is the first layer's v
    κ = k ∘ k_k / ‖k ∘ k_k‖, for each head                     what is removed
    k = k ∘ (1 + (α - 1) ∘ k_a)                                what is added
    S_t = (diag(w_t) - (κ_t ∘ α_t) κ_tᵀ) S_{t-1} + k_t v_tᵀ    (b h n n), the state, as (keys, values)
    o = S_tᵀ r_t
    y = group_norm(o) + (Σ r ∘ r_k ∘ k) v                      for each head
    out = o_proj(y ∘ g_lora(x^g))
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import generalized_delta_rule, generalized_delta_rule_step, rms_norm
from ssmkernels.core.autocast import widened
from ssmkernels.core.validate import precision
from ssmkernels.native.calls import Calls, NotPreparedError
from ssmzoo.init import wide_dtype
from ssmzoo.linear import Linear, WideBiasLinear, prepare_map, prepare_maps
from ssmzoo.mixers._delta import l2_norm
from ssmzoo.mixers._gates import sigmoid
from ssmzoo.norm import HeadLayerNorm, prepare_head_norm
from ssmzoo.registry import register_mixer
from ssmzoo.state import State
from ssmzoo.token_shift import prepare_shift, token_shift
from ssmzoo.value_residual import ValueResidualMixer

SHIFTS = ("r", "w", "k", "v", "a", "g")
KAPPA_EPS = 1e-12  # the least norm that what is removed is divided by


@dataclasses.dataclass
class RWKV7State(State):
    """The last input of each sequence, and the matrix of each head."""

    shift: Tensor  # (s, d), float32
    S: Tensor  # (s, h, n, n), float32


class LoRA(nn.Module):
    """W₂ f(W₁ x) + bias."""

    def __init__(self, d: int, rank: int, activation: nn.Module, bias: bool = True):
        super().__init__()
        self.lora = nn.Sequential(Linear(d, rank, bias=False), activation, WideBiasLinear(rank, d, bias=bias))
        if bias:
            self.lora[2].bias = nn.Parameter(torch.empty(d, dtype=wide_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)

    @torch.no_grad()
    def start(self, bias: Tensor | None) -> None:
        """The second map orthogonal, scaled by 0.1, and more where the rank is above d."""
        second = self.get_parameter("lora.2.weight")
        wide = torch.empty(second.shape, dtype=wide_dtype(), device=second.device)  # half precision has no QR
        second.copy_(nn.init.orthogonal_(wide, gain=0.1 * math.sqrt(max(1, second.shape[1] / second.shape[0]))))
        if bias is not None:
            self.get_parameter("lora.2.bias").copy_(bias)


def _prepare_lora(calls: Calls, lora: nn.Module | None, x: Tensor) -> Tensor:
    if type(lora) is not LoRA:
        raise NotPreparedError(type(lora).__name__)
    return prepare_maps(calls, lora.lora, x)


@register_mixer("rwkv7")
class RWKV7(ValueResidualMixer):
    """RWKV-7's time mixing: a delta rule with decays and learning rates of its own for each channel.

    Args:
        d_model: width of input and output.
        head_dim: n, channels of each head's keys and values.
        decay_low_rank_dim: rank of the decay's map; max(32, 2.5 √d_model rounded to a multiple of 32) if None.
        a_low_rank_dim: rank of the in-context learning rate's map, likewise.
        v_low_rank_dim: rank of the value residual's map; max(32, 1.7 √d_model rounded to a multiple of 32) if None.
        gate_low_rank_dim: rank of the gate; max(32, 5 √d_model rounded to a multiple of 32) if None.
        value_residual: values are mixed with those of the model's first layer of this kind, as in all but the first of
            a published model. On its own, or as the first layer itself, a mixer takes its own values for those.
        norm_eps: added to the variance, times head_dim.

    The names of its weights are those of flash-linear-attention. They start as in the published training code, by the
    depth of the layer; in a model the output map and the first low-rank maps start at 0. Biases of the decay, the
    learning rate and the value residual stay float32.
    """

    crosses_in_ops = True
    state_class = RWKV7State
    residual_projections = ("o_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int = 64,
        decay_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        v_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        value_residual: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__(d_model)
        ranks = {"w": decay_low_rank_dim, "a": a_low_rank_dim, "v": v_low_rank_dim, "g": gate_low_rank_dim}
        self.check_at_least(
            1,
            head_dim=head_dim,
            decay_low_rank_dim=decay_low_rank_dim,
            a_low_rank_dim=a_low_rank_dim,
            v_low_rank_dim=v_low_rank_dim,
            gate_low_rank_dim=gate_low_rank_dim,
        )
        if d_model % head_dim:
            raise ValueError(f"RWKV7: `head_dim` must divide d_model={d_model}; got {head_dim}")
        self.head_dim, self.n_heads = head_dim, d_model // head_dim
        self.value_residual = value_residual
        for name in SHIFTS:
            self.register_parameter(f"x_{name}", nn.Parameter(torch.empty(1, 1, d_model)))
        self.k_k, self.k_a = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.r_k = nn.Parameter(torch.empty(self.n_heads, head_dim))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(d_model, d_model, bias=False) for _ in range(4))
        activations = {"w": nn.Tanh(), "a": nn.Identity(), "v": nn.Identity(), "g": nn.Sigmoid()}
        factors = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
        for name, rank in ranks.items():
            if name != "v" or value_residual:
                given = rank or max(32, round(factors[name] * math.sqrt(d_model) / 32) * 32)
                self.add_module(f"{name}_lora", LoRA(d_model, given, activations[name], bias=name != "g"))
        self.g_norm = HeadLayerNorm(d_model, self.n_heads, eps=head_dim * norm_eps, bias=True)
        loras = [name for name, _ in self.named_children() if name.endswith("_lora")]
        self.float32_parameters = tuple(f"{name}.lora.2.bias" for name in loras if name != "g_lora")
        low_rank = [f"{name}.lora.{i}.weight" for name in loras for i in (0, 2)]
        self.no_weight_decay = (*(f"x_{name}" for name in SHIFTS), "r_k", *low_rank, *self.float32_parameters)
        self._start(0, 1)

    def at_layer(self, layer: int, n_layers: int) -> None:
        self._start(layer, n_layers)
        nn.init.zeros_(self.o_proj.weight)
        for name, parameter in self.named_parameters():
            if name.endswith("lora.0.weight"):
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def _start(self, layer: int, n_layers: int) -> None:
        """Starts weights for a layer: the deeper, the less is shifted and the more channels decay slowly."""
        if self.r_k.is_meta:
            return
        d, n = self.d_model, self.head_dim
        depth, height = layer / max(n_layers - 1, 1), 1 - layer / n_layers
        channel = torch.arange(d, dtype=torch.float64, device=self.r_k.device)
        for name, power in zip(SHIFTS, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            getattr(self, f"x_{name}").copy_(1 - (channel / d) ** (power * height))
        place = channel / max(d - 1, 1)
        linear = place - 0.5
        zigzag = (channel % n - (n - 1) / 2) / max((n - 1) / 2, 1)
        zigzag = zigzag * zigzag.abs()
        biases = {
            "w": -6 + 6 * place ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag,
            "a": -0.19 + 0.3 * zigzag + 0.4 * linear,
            "v": 0.73 - 0.4 * linear,
            "g": None,
        }
        for name, bias in biases.items():
            if name != "v" or self.value_residual:
                cast(LoRA, self.get_submodule(f"{name}_lora")).start(bias)
        self.k_k.copy_(0.71 - 0.1 * linear)
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        for projection, width in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            projection.weight.uniform_(-width / math.sqrt(d), width / math.sqrt(d))

    def initial_state(self, batch_size: int, max_length: int | None = None) -> RWKV7State:
        new = self.like(wide=True).new_zeros
        return RWKV7State(new(batch_size, self.d_model), new(batch_size, self.n_heads, self.head_dim, self.head_dim))

    def mixing_flops(self, context: int) -> float:
        """Nine for each number of the state."""
        return 9 * self.d_model * self.head_dim

    def mix_values(
        self, x: Tensor, state: RWKV7State | None, cu_seqlens: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, RWKV7State | None, Tensor]:
        before, S = (None, None) if state is None else (state.shift, state.S)
        previous, last = token_shift(x, before, cu_seqlens)
        shift = previous - x
        x_r, x_w, x_k, x_v, x_a, x_g = (
            torch.addcmul(x, shift, widened(getattr(self, f"x_{name}"), x)) for name in SHIFTS
        )
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        own = v
        w, a = (self.get_submodule(f"{name}_lora")(shifted) for name, shifted in (("w", x_w), ("a", x_a)))
        log_decay = -math.exp(-0.5) * sigmoid(w.to(precision(w)))
        alpha = torch.sigmoid(a)
        if self.value_residual:
            share = torch.sigmoid(self.get_submodule("v_lora")(x_v))
            v = torch.lerp(v, v if first is None else first.to(v.dtype), share)
        gate = self.get_submodule("g_lora")(x_g)
        kappa = F.normalize(self._heads(k * self.k_k), dim=-1, eps=KAPPA_EPS)  # (b l h n)
        k_a = widened(self.k_a, alpha)
        k = k * torch.addcmul(1 - k_a, alpha, k_a)
        k, kappa = k.to(r.dtype), kappa.to(r.dtype)  # autocast leaves products with weights in the weights' dtype
        r, k, v, alpha, log_decay = (self._heads(t) for t in (r, k, v, alpha, log_decay))
        removed = (kappa * alpha).neg_()  # in place: one tensor less
        o, S = self._recurrence(r, k, v, kappa, removed, log_decay, S, cu_seqlens)
        y = self.g_norm(o) + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        return self.o_proj(y * gate), None if state is None else RWKV7State(last, S), own

    def prepare_step(
        self, calls: Calls, x: Tensor, state: RWKV7State, values: list[Tensor] | None = None
    ) -> Tensor | None:
        values, m = [] if values is None else values, self._modules
        shares = [self.get_parameter(f"x_{name}") for name in SHIFTS]
        x_r, x_w, x_k, x_v, x_a, x_g = prepare_shift(calls, x, state.shift, shares)
        r, k, own = (prepare_map(calls, m[f"{name}_proj"], t) for name, t in (("r", x_r), ("k", x_k), ("v", x_v)))
        w, a, gate = (_prepare_lora(calls, m[f"{name}_lora"], t) for name, t in (("w", x_w), ("a", x_a), ("g", x_g)))
        log_decay = calls.activated(w, "sigmoid", scale=-math.exp(-0.5))
        v = own
        if self.value_residual and values:
            apart = calls.activated(own, scale=-1.0, addend=values[0])
            v = calls.activated(_prepare_lora(calls, m["v_lora"], x_v), "sigmoid", factor=apart, addend=own)
        if not values:
            values.append(own)
        kappa = self._heads(calls.activated(k, factor=self.k_k.view(1, -1)))
        weight, eps = l2_norm(kappa, KAPPA_EPS**2)
        kappa = calls.op(rms_norm, kappa, weight, eps=eps)
        less = calls.activated(a, "sigmoid", slope=-1.0, scale=-1.0, factor=self.k_a.view(1, -1))  # (α - 1) ∘ k_a
        k = calls.activated(less, factor=k, addend=k)
        removed = calls.activated(a, "sigmoid", scale=-1.0, factor=kappa.flatten(1))
        heads = [self._heads(t) for t in (r, k, v)]
        further = (kappa, self._heads(removed), self._heads(log_decay))
        o = calls.op(generalized_delta_rule_step, state.S, *heads, *further, scale=1.0)
        alike = calls.head_sum(self._heads(calls.activated(r, factor=k)), self.r_k).view(-1, 1)
        normed = prepare_head_norm(calls, self.g_norm, o)
        y = calls.activated(v.view(-1, self.head_dim), factor=alike, addend=normed.view(-1, self.head_dim))
        return prepare_map(calls, self.o_proj, calls.activated(y.view(x.shape), factor=gate))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.head_dim))

    def _recurrence(
        self,
        r: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        log_decay: Tensor,
        S: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """o (b l h n) and the state after it; by the step where there is one token of each sequence and no gradient."""
        if S is not None and cu_seqlens is None and r.shape[1] == 1 and not torch.is_grad_enabled():
            one = [t[:, 0] for t in (r, k, v, a, b, log_decay)]
            return generalized_delta_rule_step(S, *one, scale=1.0)[:, None], S
        found = generalized_delta_rule(
            r, k, v, a, b, log_decay, scale=1.0, initial_state=S, return_final_state=True, cu_seqlens=cu_seqlens
        )
        return cast(tuple[Tensor, Tensor], found)
