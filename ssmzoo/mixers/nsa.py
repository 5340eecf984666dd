"""Native sparse attention (Yuan et al. 2025, arXiv 2502.11089)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import attention, selected_attention
from ssmkernels.core.autocast import in_autocast
from ssmkernels.ops.selected_attention.selection import select_blocks
from ssmzoo.init import starting
from ssmzoo.linear import Linear
from ssmzoo.mixers._selecting import SelectingAttention, SelectingOptions
from ssmzoo.registry import register_mixer


@dataclasses.dataclass(kw_only=True)
class NsaOptions(SelectingOptions):
    """Beside those of :class:`~ssmzoo.mixers._selecting.SelectingOptions`. The defaults are the paper's.

    Attributes:
        compress_block: l, tokens that are compressed into one.
        compress_stride: d, tokens between the beginnings of two such stretches; divides l and ``block_size``.
        block_size: l', tokens of a block that is selected.
        n_selected: n, blocks that a query selects, those below included.
        n_initial: first blocks of the sequence that every query selects.
        n_local: latest blocks that every query selects, its own included.
        window: w, latest tokens that every query sees, itself included.
        compression: "mlp" is the paper's: a learned map of a stretch with a learned embedding of the places in it;
            "mean" is the mean of its keys, or values, without weights.
        separate_kv: whether each branch has keys and values of its own, as in the paper; otherwise they share them.
    """

    compress_block: int = 32
    compress_stride: int = 16
    block_size: int = 64
    n_selected: int = 16
    n_initial: int = 1
    n_local: int = 2
    window: int = 512
    compression: Literal["mlp", "mean"] = "mlp"
    separate_kv: bool = True


@register_mixer("nsa")
class Nsa(SelectingAttention):
    """Causal attention to compressed tokens, to the blocks that these show to matter, and to a window.

    It approximates softmax attention by three branches, which gates weigh (equations 5 to 12). With k̃_i = φ(k of
    tokens i·d … i·d + l - 1), and likewise ṽ_i::

        p^c_t = softmax(q_t · k̃_i / √head_dim)               over the stretches i that end at t or before
        p^s_t[j] = Σ_m Σ_n p^c_t[(l'/d) j + m - n]            for 0 ≤ m < l'/d, 0 ≤ n < l/d; summed over a group's heads
        B(t)  = the n blocks j of the largest p^s_t[j], the first and the latest ones in any case
        out_t = g^c_t Σ_i p^c_t[i] ṽ_i + g^s_t attention over B(t) + g^w_t attention over the window
        g_t   = σ(W_g x_t)                                    one number for each head and branch

    Query heads that share keys select the same blocks. φ is a two-layer MLP on a flattened stretch, with a hidden width
    of l · head_dim / 4; the paper gives no width. Its gates are of an MLP; here, as in published code, of a linear map.
    The selection has no gradient: p^c learns through the compressed branch.

    Args:
        d_model: width of input and output.
        options: those of :class:`NsaOptions`.

    Its state is a :class:`~ssmzoo.mixers._selecting.SummaryCache`: all keys and values of each branch, of which a step
    reads few, and the compressed ones.

    Raises:
        ValueError: sizes that do not fit together.
    """

    options_class = NsaOptions

    def __init__(self, d_model: int, **options: Any):
        o = NsaOptions(**options)
        super().__init__(d_model, o, copies=3 if o.separate_kv else 1)
        self.check_at_least(1, compress_block=o.compress_block, compress_stride=o.compress_stride, window=o.window)
        self.check_at_least(1, block_size=o.block_size, n_local=o.n_local)
        self.check_at_least(0, n_initial=o.n_initial)
        for name, size in (("compress_block", o.compress_block), ("block_size", o.block_size)):
            if size % o.compress_stride:
                raise ValueError(f"Nsa: `compress_stride` must divide `{name}`={size}; got {o.compress_stride}")
        if o.n_selected < o.n_initial + o.n_local:
            raise ValueError(
                f"Nsa: `n_selected` must be at least n_initial + n_local, {o.n_initial + o.n_local}; got {o.n_selected}"
            )
        self.stretch, self.stride = o.compress_block, o.compress_stride
        self.least_length = self.stretch + 3 * self.stride  # among fewer compressed keys nothing is to be weighed
        self.block_size, self.n_selected, self.window = o.block_size, o.n_selected, o.window
        self.n_initial, self.n_local = o.n_initial, o.n_local
        self.gate_proj = Linear(d_model, 3 * self.n_heads)
        self.compress = o.compression == "mlp"
        if self.compress:
            self.k_compress, self.v_compress = (
                Compress(self.n_kv_heads, o.compress_block, self.head_dim) for _ in "kv"
            )

    def mixing_flops(self, context: int) -> float:
        """4 d for each compressed, selected or recent key that a query sees, 2 d for each that it looks at; by head.

        The compression is one for each stretch and head of keys, and not for each token as other linear maps are.
        """
        compressed = self.complete(context) / 2
        seen = compressed + sum(min((context + 1) / 2, n) for n in (self.n_selected * self.block_size, self.window))
        flops = self.n_heads * self.head_dim * (4 * seen + 2 * compressed)
        maps = [m for phi in (self.k_compress, self.v_compress) for m in (phi.up, phi.down)] if self.compress else []
        weights = sum(m.weight.numel() for m in maps)
        return flops + 2 * weights * (self.n_kv_heads / self.stride - 1)

    def branch(self, x: Tensor, branch: int) -> Tensor:
        """Keys or values (b m h d) of the compressed branch, 0; the selected one, 1; or the window, 2."""
        first = branch * self.n_kv_heads if self.copies > 1 else 0
        return x[:, :, first : first + self.n_kv_heads]

    def summarise(self, k: Tensor, v: Tensor) -> Tensor:
        """Compressed keys and values, side by side: ``(b, n, h_kv, 2 d)``."""
        compressed = []
        for x, kind in ((in_autocast(k), "k_compress"), (in_autocast(v), "v_compress")):
            count = self.complete(x.shape[1])
            place = torch.arange(count, device=x.device)[:, None] * self.stride
            place = place + torch.arange(self.stretch, device=x.device)  # (n stretch)
            stretches = self.branch(x, 0)[:, place].transpose(2, 3)  # (b n h stretch d)
            compressed.append(getattr(self, kind)(stretches) if self.compress else stretches.mean(3))
        return torch.cat(compressed, dim=3)

    def no_summaries(self, batch_size: int) -> Tensor:
        return self.like().new_zeros(batch_size, 0, self.n_kv_heads, 2 * self.head_dim)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, summaries: Tensor) -> Tensor:
        l, length = q.shape[1], k.shape[1]
        k_c, v_c = (t.to(q.dtype) for t in summaries.chunk(2, dim=3))
        place = torch.arange(length - l, length, device=q.device).expand(q.shape[0], -1)
        end = torch.arange(k_c.shape[1], device=q.device) * self.stride + self.stretch - 1
        compressed = attention(
            q, k_c, v_c, causal=True, q_positions=place, k_positions=end.expand(q.shape[0], -1).contiguous()
        )
        blocks = self.selected(q, k_c, length)
        selected = selected_attention(q, self.branch(k, 1), self.branch(v, 1), blocks, block_size=self.block_size)
        k_w, v_w = (self.branch(t, 2)[:, max(0, length - l - self.window + 1) :] for t in (k, v))
        recent = attention(q, k_w, v_w, causal=True, window=(self.window - 1, 0))
        gates = torch.sigmoid(self.gate_proj(x)).unflatten(-1, (3, self.n_heads, 1)).unbind(2)
        out = gates[0] * compressed
        for gate, branch in zip(gates[1:], (selected, recent), strict=True):
            assert isinstance(branch, Tensor)
            out = torch.addcmul(out, gate, branch)
        return out

    def selected(self, q: Tensor, k_c: Tensor, length: int) -> Tensor:
        """int32 ``(b, l, h_kv, n_selected)``: the blocks that the newest queries of ``length`` tokens see."""
        numbers = (length, self.stretch, self.stride, self.block_size, self.n_selected, self.n_initial, self.n_local)
        select = _select if torch.compiler.is_compiling() else select_blocks
        return select(q.detach(), k_c.detach(), *numbers)


class Compress(nn.Module):
    """φ: a stretch of keys or values ``(…, h, l, d)``, and a learned embedding of its places, to one ``(…, h, d)``."""

    def __init__(self, heads: int, length: int, head_dim: int):
        super().__init__()
        self.places = nn.Parameter(
            starting((heads, length, head_dim), None, lambda: torch.zeros(heads, length, head_dim))
        )
        width = max(head_dim, length * head_dim // 4)
        self.up, self.down = Linear(length * head_dim, width), Linear(width, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up((x + self.places).flatten(-2))))
        return y


# One node of compiled code, whose loop would tie it to one length.
_select = torch.library.custom_op("ssmzoo::nsa_blocks", select_blocks, mutates_args=())


@_select.register_fake
def _(
    q: Tensor, k_c: Tensor, length: int, stretch: int, stride: int, block_size: int, n_selected: int, *_: int
) -> Tensor:
    return q.new_empty(*q.shape[:2], k_c.shape[2], n_selected, dtype=torch.int32)
