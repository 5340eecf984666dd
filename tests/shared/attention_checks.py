"""What layers with caches have to do, whichever they are: on the meta device, under autocast, and compiled."""

from __future__ import annotations

import torch
from attention_layers import D_MODEL, inputs, packed


def single_tokens_on_meta(mixer, even):
    """On the meta device nothing can be read on the host."""
    mixer = mixer.to("meta")
    x = torch.empty(2, 12, D_MODEL, device="meta", dtype=torch.float64)
    _, state = mixer(x, mixer.initial_state(2))
    state.even = even
    for length in (1, 1, 3):
        y, state = mixer(x[:, :length], state)
        assert y.shape == (2, length, D_MODEL)


@torch.no_grad()
def autocast(mixer, cut):
    """A float32 mixer under autocast: whole and in chunks from ``cut`` on the same, and near to float32."""
    x = inputs(2, 20).float()
    with torch.autocast("cpu", torch.bfloat16):
        whole = mixer(x)
        _, state = mixer(x[:, :cut], mixer.initial_state(2, 64))
        chunk, state = mixer(x[:, cut:19], state)
        token, state = mixer(x[:, 19:], state)
    assert whole.dtype == state.keys.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([chunk, token], dim=1), whole[:, cut:], rtol=0.05, atol=0.05)
    torch.testing.assert_close(whole.float(), mixer(x), rtol=0.1, atol=0.1)


def compiles_packed(mixer):
    x, cu_seqlens = inputs(1, 12), packed([5, 0, 7])
    torch._dynamo.reset()
    results = []
    for function in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        y = function(x, cu_seqlens=cu_seqlens)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))])
    torch.testing.assert_close(*results)


@torch.no_grad()
def compiles_with_a_state(mixer, lengths):
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    x = inputs(2, sum(lengths))
    state, outputs = mixer.initial_state(2, 64), []
    for piece in x.split(lengths, dim=1):
        y, state = compiled(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), mixer(x), rtol=1e-9, atol=1e-11)
