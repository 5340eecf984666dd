"""The gated products of transformers' MLPs, silu(gate) · up: several passes over memory there, and one here."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ssmkernels import swiglu
from ssmkernels.native import eager
from ssmzoo.integrations.transformers.layers import Function
from ssmzoo.linear import is_untouched

FEW = 2**16  # numbers of an MLP's input below which its operators stay as they are; chosen, not measured


def two_maps(original: Function) -> Function:
    """An MLP whose gate and what it gates are maps of their own, in Falcon-H1 with constant factors."""

    @functools.wraps(original)
    def forward(self: Any, x: Tensor) -> Any:
        if not _worth_it(x, self.act_fn):
            return original(self, x)
        before, after = getattr(self, "gate_multiplier", 1.0), getattr(self, "down_multiplier", 1.0)
        y = self.down_proj(_product(self.act_fn, self.gate_proj(x), self.up_proj(x), before))
        return y if after == 1 else y * after

    return forward


def one_map(original: Function) -> Function:
    """Granite's shared experts, whose gate is the first half of a map, and what it gates the second."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not _worth_it(hidden_states, self.activation):
            return original(self, hidden_states)
        gate, up = self.input_linear(hidden_states).chunk(2, dim=-1)
        return self.output_linear(_product(self.activation, gate, up, 1.0))

    return forward


# The MLPs of each kind: families of transformers, and their classes
KINDS: dict[Any, dict[str, str]] = {
    two_maps: {
        "bailing_hybrid": "BailingHybridMLP",
        "bamba": "BambaMLP",
        "falcon_h1": "FalconH1MLP",
        "jamba": "JambaMLP",
        "kimi_linear": "KimiLinearMLP",
        "olmo_hybrid": "OlmoHybridMLP",
        "qwen3_5": "Qwen3_5MLP",
        "qwen3_5_moe": "Qwen3_5MoeMLP",
        "qwen3_next": "Qwen3NextMLP",
        "qwen4_exp": "Qwen4ExpTextMLP",
        "zamba": "ZambaMLP",
    },
    one_map: {"granitemoehybrid": "GraniteMoeHybridMLP"},
}


def _worth_it(x: Tensor, activation: Any) -> bool:
    """Whether an MLP's input is large, and its activation SiLU in which nobody else has a say.

    A compiler makes one pass of the operators by itself.
    """
    if x.numel() < FEW or torch.compiler.is_compiling():  # first: each token asks
        return False
    from transformers.activations import SiLUActivation

    return type(activation) in (SiLUActivation, nn.SiLU) and is_untouched(activation)


def _product(activation: Any, gate: Tensor, up: Tensor, scale: float) -> Tensor:
    """silu(scale · gate) · up. Half precision stays with PyTorch, which rounds between its operators."""
    if gate.shape == up.shape and eager.float32(gate, up) and eager.reachable(gate=gate, up=up):
        return swiglu(gate, up, scale=scale)
    return activation(gate if scale == 1 else gate * scale) * up
