"""Other people's matrix memories."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmkernels.bench.peers import FROM_ZERO, TRANSFORMERS, Peer, calls_like

SETTINGS = {"mlstm": FROM_ZERO}


@calls_like("mlstm", takes="return_final_state")
def transformers(a: Any) -> Tensor | tuple[Tensor, ...]:
    """The backend of transformers' xLSTM, which takes heads before time."""
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMBackend

    backend = xLSTMBackend(xLSTMConfig(mode="inference"))
    y, (C, n, m) = backend(*(t.transpose(1, 2) for t in (a.q, a.k, a.v, a.i, a.f)))
    y = y.transpose(1, 2).to(a.q.dtype)
    return (y, C, n, m[..., 0]) if a.return_final_state else y


PEERS = {"mlstm": (Peer("transformers", TRANSFORMERS, transformers, "in chunks of 64 tokens, in PyTorch"),)}
