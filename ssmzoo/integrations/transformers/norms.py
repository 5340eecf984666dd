"""Root-mean-square norms of transformers' layers, which are several passes over memory there, and one here."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels import rms_norm
from ssmzoo.integrations.transformers.layers import Function

FEW = 2**18  # numbers below which transformers' own operations take about as long, with gradients


def plain(original: Function) -> Function:
    """x / √(mean(x²) + eps) · weight."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not _ours(hidden_states, self.weight):
            return original(self, hidden_states)
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)

    return forward


def zero_centred(original: Function) -> Function:
    """The same with 1 + weight, as in Gemma."""

    @functools.wraps(original)
    def forward(self: Any, x: Tensor) -> Any:
        if not _ours(x, self.weight):
            return original(self, x)
        return rms_norm(x, 1.0 + self.weight, eps=self.eps, group_size=_group(self))

    return forward


def gate_first(original: Function) -> Function:
    """The norm of x · silu(gate), over groups of channels since transformers 5.23, as in Mamba-2."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Any:
        if not _ours(hidden_states, self.weight, gate):
            return original(self, hidden_states, gate)
        how: dict[str, Any] = {"eps": self.variance_epsilon, "group_size": _group(self), "norm_before_gate": False}
        return rms_norm(hidden_states, self.weight, gate=gate, **how)

    return forward


def either_first(original: Function) -> Function:
    """Falcon-H1's, whose config says whether gate or norm comes first."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Any:
        if hidden_states.shape[-2] == 1 or not _ours(hidden_states, self.weight, gate):  # one token may lose its axis
            return original(self, hidden_states, gate)
        how: dict[str, Any] = {"eps": self.variance_epsilon, "norm_before_gate": self.norm_before_gate}
        groups = hidden_states.shape[-1] // self.n_groups
        return rms_norm(hidden_states, self.weight, gate=gate, group_size=groups, **how)

    return forward


def gate_last(original: Function) -> Function:
    """The norm, times an activation of the gate, as in gated DeltaNet and KDA."""

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Any:
        activation = getattr(self, "activation", None)
        known = activation in ("silu", "swish", "sigmoid")
        if gate is None or not known or not _ours(hidden_states, self.weight, gate):
            return original(self, hidden_states, gate)
        if activation == "sigmoid":
            normed: Any = rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
            return normed * F.sigmoid(gate)
        return rms_norm(hidden_states, self.weight, gate=gate, eps=self.variance_epsilon)

    return forward


# The norms of each kind: families of transformers, and their classes
KINDS: dict[Any, dict[str, tuple[str, ...]]] = {
    plain: {
        "mamba": ("MambaRMSNorm",),
        "mamba2": ("Mamba2RMSNorm",),
        "falcon_mamba": ("FalconMambaRMSNorm",),
        "jamba": ("JambaRMSNorm",),
        "zamba": ("ZambaRMSNorm",),
        "bamba": ("BambaRMSNorm",),
        "zamba2": ("Zamba2RMSNorm",),
        "falcon_h1": ("FalconH1RMSNorm",),
        "granitemoehybrid": ("GraniteMoeHybridRMSNorm",),
        "nemotron_h": ("NemotronHRMSNorm",),
        "minimax": ("MiniMaxRMSNorm",),
        "lfm2": ("Lfm2RMSNorm",),
        "lfm2_moe": ("Lfm2MoeRMSNorm",),
        "lfm3": ("Lfm3RMSNorm",),
        "lara_mini": ("LaraMiniRMSNorm",),
        "kimi_linear": ("KimiLinearRMSNorm",),
        "bailing_hybrid": ("BailingHybridRMSNorm",),
        "glm5_next": ("Glm5NextTextRMSNorm", "Glm5NextRMSNorm"),
        "olmo_hybrid": ("OlmoHybridRMSNorm",),
        "inkling": ("InklingRMSNorm",),
        "inkling2": ("Inkling2RMSNorm",),
    },
    zero_centred: {
        "qwen3_next": ("Qwen3NextRMSNorm",),
        "qwen3_5": ("Qwen3_5RMSNorm",),
        "qwen3_5_moe": ("Qwen3_5MoeRMSNorm",),
        "qwen4_exp": ("Qwen4ExpTextRMSNorm",),
        "recurrent_gemma": ("RecurrentGemmaRMSNorm",),
    },
    gate_first: {
        "mamba2": ("MambaRMSNormGated",),
        "bamba": ("BambaRMSNormGated",),
        "zamba2": ("Zamba2RMSNormGated",),
        "granitemoehybrid": ("GraniteMoeHybridRMSNormGated",),
        "nemotron_h": ("NemotronHRMSNormGated",),
    },
    either_first: {"falcon_h1": ("FalconH1RMSNormGated",)},
    gate_last: {
        "qwen3_next": ("Qwen3NextRMSNormGated",),
        "qwen3_5": ("Qwen3_5RMSNormGated",),
        "qwen3_5_moe": ("Qwen3_5MoeRMSNormGated",),
        "qwen4_exp": ("Qwen4ExpTextRMSNormGated",),
        "olmo_hybrid": ("OlmoHybridRMSNormGated",),
        "lara_mini": ("LaraMiniRMSNormGated",),
        "kimi_linear": ("KimiLinearRMSNormGated",),
        "bailing_hybrid": ("BailingHybridRMSNormGated",),
        "glm5_next": ("Glm5NextTextRMSNormGated",),
    },
}


def _group(norm: Any) -> int | None:
    """How many channels a norm takes together; None for all."""
    found: int | None = getattr(norm, "group_size", None)
    return found


def _ours(x: Tensor, weight: Tensor, gate: Tensor | None = None) -> bool:
    """Whether our op gives the same numbers, and sooner.

    transformers rounds narrower dtypes between norm and weight, and takes float64 for float32. A compiler makes one
    pass of its operations by itself. Tensors of other types, such as weights spread over processes, stay with it.
    """
    given = (x, weight) if gate is None else (x, weight, gate)
    return (
        x.numel() >= FEW
        and not torch.compiler.is_compiling()
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given)
        and all(type(t) in (Tensor, nn.Parameter) for t in given)
        and (gate is None or gate.shape == x.shape)
    )
