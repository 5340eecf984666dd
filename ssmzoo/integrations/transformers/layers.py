"""What takes the place of functions and methods that no look-up reaches. Each takes the original, and gives ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ssmkernels import linear_attention, linear_recurrence, mlstm
from ssmkernels.compat.sequences import runs
from ssmzoo.integrations.transformers.scope import Scope, current, entered

Function = Callable[..., Any]
FEW = 2**17  # numbers of a state up to which single operations of PyTorch take less time than a call of an op
CACHES = ("cache", "cache_params", "past_key_values")  # since transformers 5.24, and before


def cache_among(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The cache of a call, by position or by any of its names, or None."""
    named = [kwargs[name] for name in CACHES if kwargs.get(name) is not None]
    return next((cache for cache in (*args, *named) if cache is not None), None)


def recurrent_state(cache: Any, layer: int) -> Tensor | None:
    """The state of a layer; None before the first token."""
    if hasattr(cache, "get_recurrent_state"):
        found: Tensor | None = cache.get_recurrent_state(layer)
        return found
    return cast("Tensor | None", cache.layers[layer].recurrent_states[0])  # before transformers 5.21


def mixer(original: Function) -> Function:
    """A layer of Mamba tells its scan the state from which it goes on, and the sequences that are packed."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seq_idx = kwargs.get("seq_idx")
        scope = Scope(seq_idx=current().seq_idx if seq_idx is None else seq_idx)
        cache = cache_among(args[:1], kwargs)
        if cache is not None and hidden_states.shape[1] > 1:
            state = recurrent_state(cache, self.layer_idx)
            if state is not None:  # (b d n), or (b h d n) where each head is scanned by itself
                scope.states = [state] if state.ndim == 3 else list(state.unbind(1))
        if scope.seq_idx is None and not scope.states:
            return original(self, hidden_states, *args, **kwargs)
        with entered(scope):
            return original(self, hidden_states, *args, **kwargs)

    return forward


def telling(original: Function) -> Function:
    """A model or block that takes ``seq_idx`` and does not pass it on."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seq_idx = kwargs.get("seq_idx")
        if seq_idx is None:
            return original(self, *args, **kwargs)
        with entered(Scope(seq_idx=seq_idx)):
            return original(self, *args, **kwargs)

    return forward


def told(original: Function) -> Function:
    """A call of a block, which gradient checkpointing repeats with the same arguments outside of its model."""

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seq_idx = current().seq_idx
        return original(self, *args, **(kwargs if seq_idx is None else {"seq_idx": seq_idx} | kwargs))

    return call


def apart(original: Function) -> Function:
    """A convolution that no sequences reach: the first outputs of each are computed once more, from that one alone.

    Those further on see tokens of their own sequence only. The first sequence of a row goes on from the cache.
    """

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, dynamic_input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = original(self, hidden_states, dynamic_input, *args, **kwargs)
        seq_idx, reach, length = current().seq_idx, self.conv_kernel_size - 1, hidden_states.shape[1]
        if seq_idx is None or kwargs.get("seq_idx") is not None or reach == 0:  # which it takes since transformers 5.24
            return y
        borders = runs("Inkling2DynamicShortConvolution", seq_idx, self.conv_kernel_size)[1].tolist()
        x, others, mask = hidden_states.flatten(0, 1), dynamic_input.flatten(0, 1), kwargs.get("conv_mask")
        mask = None if mask is None else mask.flatten(0, 1)
        parts, done = [], 0
        for start, end in zip(borders, borders[1:], strict=False):
            if start % length:
                few = slice(start, min(start + reach, end))
                alone = original(
                    self, x[None, few], others[None, few], conv_mask=None if mask is None else mask[None, few]
                )
                parts += [y.flatten(0, 1)[done:start], alone[0]]
                done = few.stop
        return torch.cat([*parts, y.flatten(0, 1)[done:]]).view_as(y)

    return forward


def rnn_scan(original: Function) -> Function:
    """RecurrentGemma's recurrence, which is a loop over time there."""

    @functools.wraps(original)
    def scan(
        self: Any,
        hidden_states: Tensor,
        recurrent_gate: Tensor,
        reset: Tensor,
        recurrent_states: Tensor | None,
        acc_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        if acc_dtype != torch.float32 or hidden_states.dtype == torch.float64:
            found: tuple[Tensor, Tensor] = original(
                self, hidden_states, recurrent_gate, reset, recurrent_states, acc_dtype
            )
            return found
        a = recurrent_gate.to(acc_dtype) * ~reset
        state = None if recurrent_states is None else recurrent_states.to(a)
        y, last = linear_recurrence(a, hidden_states, initial_state=state, return_final_state=True)
        return y, last

    return scan


def lightning(original: Function) -> Function:
    """MiniMax's lightning attention, which is a loop over blocks, or over tokens where there is a cache."""

    @functools.wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        cache = cache_among(args[:1], kwargs)
        state = None if cache is None else cache.get_linear_cache(self.layer_idx)
        if state is not None and hidden_states.shape[1] == 1 and state.numel() <= FEW:  # there is no loop to save
            given = (self, hidden_states, position_embeddings, attention_mask, *args)
            return cast(tuple[Tensor, Tensor], original(*given, **kwargs))
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = qkv * attention_mask[:, :, None]
        qkv = qkv.unflatten(-1, (self.num_attention_heads, -1)).to(hidden_states.dtype)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        q, k, v = qkv.chunk(3, dim=-1)
        y, last = linear_attention(
            q,
            k,
            v,
            -self.slope_rate.flatten().to(wide),
            scale=1.0,
            initial_state=None if state is None else state.to(wide),
            return_final_state=True,
        )
        y = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(y.flatten(2))
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, last)
        return self.out_proj(y), last

    return forward


def matrix_memory(original: Function) -> Function:
    """xLSTM's matrix memory, whose heads come before time."""

    @functools.wraps(original)
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        igate: Tensor,
        fgate: Tensor,
        c_initial: Tensor | None = None,
        n_initial: Tensor | None = None,
        m_initial: Tensor | None = None,
        return_last_states: bool | None = None,
        mode: str | None = None,
    ) -> Any:
        if query.shape[2] == 1 and c_initial is not None:  # one step, for which there is no loop to save
            states = (c_initial, n_initial, m_initial, return_last_states, mode)
            return original(self, query, key, value, igate, fgate, *states)
        training = "train" in (self.config.mode if mode is None else mode)
        given = [t.transpose(1, 2) for t in (query, key, value, igate, fgate)]
        given[3:] = (t.to(torch.promote_types(query.dtype, torch.float32)) for t in given[3:])
        initial = None
        if c_initial is not None and n_initial is not None and m_initial is not None:
            wide, copy = given[3].dtype, torch.is_grad_enabled()  # as the model writes its states in place
            c, n, m = (t.to(wide, copy=copy) for t in (c_initial, n_initial, m_initial.flatten(1)))
            initial = c, n, m
        y, (c, n, m) = mlstm(*given, initial_state=initial, return_final_state=True)
        y = y.transpose(1, 2)
        wanted = self.config.return_last_states if return_last_states is None else return_last_states
        return (y, (c, n, m[..., None])) if wanted or not training else y

    return forward


def weighted_key_values(original: Function) -> Function:
    """RWKV-4's recurrences of a numerator and a denominator, kept small by the running maximum of their exponents.

    With w the decay and k the keys, both are h_t = exp(m_{t-1} - w - m_t) h_{t-1} + exp(k_t - m_t) x_t, where m_t = max
    (m_{t-1} - w, k_t), which is a cumulative maximum of k_t + w t, less w t. Where m cancels it has no gradient.
    """

    @functools.wraps(original)
    def attention(
        time_decay: Tensor,
        time_first: Tensor,
        key: Tensor,
        value: Tensor,
        state: Any = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Any]:
        if key.device.type != "cpu" or key.shape[1] < 2:  # for one token there is no loop to save
            return cast(tuple[Tensor, Any], original(time_decay, time_first, key, value, state, return_state))
        wide = torch.promote_types(torch.float32, time_decay.dtype)
        w, k, v = torch.exp(time_decay), key.to(wide), value.to(wide)
        state = None if state is None else [part.to(wide) for part in state]
        before = torch.full_like(k[:, 0], -1e38) if state is None else state[2]
        m = _maxima(k.detach(), w.detach(), before.detach())  # (b l+1 d)
        a = torch.exp(m[:, :-1] - m[:, 1:] - w)
        b = torch.exp(k - m[:, 1:])
        x = torch.cat([b * v, b], dim=-1)  # (b l 2d), numerators and denominators
        initial = x.new_zeros(len(x), x.shape[-1]) if state is None else torch.cat([state[0], state[1]], dim=-1)
        h = cast(Tensor, linear_recurrence(torch.cat([a, a], dim=-1), x, initial_state=initial))
        past = torch.cat([initial[:, None], h[:, :-1]], dim=1)
        largest = torch.maximum(m[:, :-1], (k + time_first).detach())
        old, new = torch.exp(m[:, :-1] - largest), torch.exp(k + time_first - largest)
        numerator, denominator = (old.repeat(1, 1, 2) * past + torch.cat([new * v, new], dim=-1)).chunk(2, dim=-1)
        if return_state or state is not None:
            state = [*h[:, -1].chunk(2, dim=-1), m[:, -1]]
        return (numerator / denominator).to(key.dtype), state

    return attention


def _maxima(k: Tensor, w: Tensor, before: Tensor) -> Tensor:
    """m from before the first token to the last, (b l+1 d): in float64, as w t grows with the length."""
    w = w.double() * torch.arange(k.shape[1] + 1, dtype=torch.float64)[:, None]  # (l+1 d)
    lifted = torch.cat([before.double()[:, None], k.double()], dim=1) + w
    return (lifted.cummax(dim=1).values - w).to(k.dtype)
