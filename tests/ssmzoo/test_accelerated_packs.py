"""Packed sequences in transformers' models on our functions: each is as it is alone."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from only_ours import only_ours
from parity import close
from transformers_families import ALONE, MODELS, OTHERS, made, modeling

from ssmzoo.integrations.transformers.functions import selective_scan_fn
from ssmzoo.integrations.transformers.layers import apart
from ssmzoo.integrations.transformers.lookups import published
from ssmzoo.integrations.transformers.scope import Scope, entered

pytestmark = pytest.mark.mixer()

PACKS = sorted(set(MODELS) - {*OTHERS, "glm5_next", "minimax"})
DROPPED = {
    "mamba2": [("Mamba2Block", "__call__"), ("Mamba2Mixer", "forward")],
    "falcon_h1": [("FalconH1DecoderLayer", "__call__"), ("FalconH1Mixer", "forward")],
    "nemotron_h": [("NemotronHMamba2Mixer", "forward")],
}


@contextlib.contextmanager
def called_as_before(family):
    """Layers and models called as transformers 5.15 and 5.16 call them, without ``seq_idx``."""

    def dropping(call):
        return lambda self, *args, seq_idx=None, **kwargs: call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for owner, method in DROPPED[family]:
            kind = getattr(modeling(family), owner)
            patch.setattr(kind, method, dropping(getattr(kind, method)))
        yield


def check_packed(family, checkpointed, calling=contextlib.nullcontext):
    model, lengths = made(family), (5, 1, 11)
    ids = torch.randint(1, 50, (1, sum(lengths)))
    weight = torch.randn(1, sum(lengths), 50)
    alone = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    (torch.cat(alone, dim=1) * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if checkpointed:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    options = {"seq_idx": torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]], dtype=torch.int32)}
    if family not in ALONE:
        options["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    if "fla" in {package for _, package in published()[family]}:
        name = "cu_seqlens" if family in ("kimi_linear", "bailing_hybrid") else "cu_seq_lens_q"  # as each hands it on
        options[name] = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
    if family == "granitemoehybrid":  # whose attention looks at no positions
        blocks = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()
        options["attention_mask"] = {"full_attention": blocks[None, None], "linear_attention": None}
    with only_ours(family), calling(family):
        logits = model(ids, use_cache=False, **options).logits
        (logits * weight).sum().backward()
    close("the logits", logits.detach(), torch.cat(alone, dim=1).detach())
    for name, gradient in expected.items():
        close(f"the gradient of {name}", model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", DROPPED)
def test_packed_sequences_train_where_nobody_hands_them_on(family, checkpointed):
    check_packed(family, checkpointed, called_as_before)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", PACKS)
def test_packed_sequences_train(family, checkpointed):
    check_packed(family, checkpointed)


@torch.no_grad()
def test_packed_rows_give_and_take_the_states_at_their_ends():
    """The first scan of a layer, told what a layer of transformers knows: a state, and two sequences in each row."""
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, 2, 4, 9)
    B, C = torch.randn(2, 2, 5, 9)
    A, state = -torch.rand(4, 5), torch.randn(2, 4, 5)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [3] * 7 + [2] * 2])
    with entered(Scope([state], seq_idx)):
        y, last = selective_scan_fn(u, delta.abs(), A, B, C, None, z, return_last_state=True)
    for row, cut in enumerate((4, 7)):
        parts = []
        for time, before in ((slice(0, cut), [state[row : row + 1]]), (slice(cut, 9), [])):
            given = [t[row : row + 1, :, time] for t in (u, delta.abs(), B, C, z)]
            with entered(Scope(before)):
                part, end = selective_scan_fn(*given[:2], A, *given[2:4], None, given[4], return_last_state=True)
            parts.append(part)
        torch.testing.assert_close(y[row : row + 1], torch.cat(parts, dim=2))
        torch.testing.assert_close(last[row : row + 1], end)
    again = Scope(seq_idx=torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 0]] * 2))
    with entered(again), pytest.raises(ValueError, match="`seq_idx`, row 0, number 0 stops after position 0"):
        selective_scan_fn(u, delta.abs(), A, B, C)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_convolutions_that_no_sequences_reach(width, masked):
    """Rows with other borders, sequences shorter than the convolution, and one that begins within padding."""

    def convolution(self, x, weights, cache=None, conv_mask=None, **_):
        x = x if conv_mask is None else x * conv_mask[..., None]
        lagged = [torch.nn.functional.pad(x, (0, 0, lag, 0))[:, : x.shape[1]] for lag in range(width)]
        return (torch.stack(lagged, -1) * weights[:, :, None]).sum(-1)

    torch.manual_seed(0)
    x, weights = torch.randn(2, 9, 3), torch.randn(2, 9, width)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [3] * 2 + [2] + [4] * 6])
    mask = torch.ones(2, 9).index_fill(1, torch.tensor([0, 4]), 0.0) if masked else None
    layer = SimpleNamespace(conv_kernel_size=width)
    with entered(Scope(seq_idx=seq_idx)):
        found = apart(convolution)(layer, x, weights, conv_mask=mask)
        whole = apart(convolution)(layer, x, weights, conv_mask=mask, seq_idx=seq_idx)
    assert torch.equal(whole, convolution(layer, x, weights, conv_mask=mask))  # which knows of them itself
    for row, borders in enumerate(((0, 4, 9), (0, 2, 3, 9))):
        for start, end in zip(borders, borders[1:], strict=False):
            here = row, slice(start, end)
            alone = convolution(
                layer, x[here][None], weights[here][None], conv_mask=mask[here][None] if masked else None
            )
            torch.testing.assert_close(found[here], alone[0])
