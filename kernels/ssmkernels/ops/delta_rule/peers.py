"""Other people's delta rules."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.bench.peers import TRANSFORMERS, Peer, calls_like, refuse


@calls_like("delta_rule", takes="log_decay initial_state return_final_state")
def transformers(a: Any) -> Tensor | tuple[Tensor, Tensor]:
    """What transformers' Qwen3-Next calls where fla is missing."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    refuse(a.log_decay is None or a.log_decay.ndim == 4, "other decays than one a head")
    chunks = getattr(torch_chunk_gated_delta_rule, "__wrapped__", torch_chunk_gated_delta_rule)
    o, last = chunks(
        a.q,
        a.k,
        a.v,
        g=a.log_decay,
        beta=a.beta,
        initial_state=a.initial_state,
        output_final_state=a.return_final_state,
    )
    return (o, last) if a.return_final_state else o


PEERS = {"delta_rule": (Peer("transformers", TRANSFORMERS, transformers, "in chunks of 64 tokens, in PyTorch"),)}
