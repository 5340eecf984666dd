"""A model that goes on decoding gets large pages under its weights, a share at each token, and the same bits."""

from __future__ import annotations

import pytest
import torch

import ssmzoo
from ssmkernels.core.pages import spans_of
from ssmzoo.bench import models
from ssmzoo.checkpoints import tensors
from ssmzoo.decoding import settling
from ssmzoo.decoding.settling import AFTER, AGAIN, SHARES


class Recorded:
    """In the place of Blocks: 100 of them for any weights."""

    made: list[Recorded]

    def __init__(self, spans):
        self.spans, self.left, self.asked = spans, 100 if spans else 0, []
        if spans:
            self.made.append(self)

    def __len__(self):
        return self.left

    def collapse(self, most):
        self.asked.append(most)
        self.left -= min(most, self.left)


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(settling, "Blocks", Recorded)
    Recorded.made = []
    return Recorded.made


def all_of(model):
    return spans_of([*model.parameters(), *model.buffers()])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mamba2-tiny", "mamba-hybrid-tiny", "transformer++-tiny"])
def test_tokens_are_counted_and_share_the_work(name, made):
    """Whether layers are called one by one or in one native call; prompts do not count."""
    model = ssmzoo.build(name).eval()
    ids = torch.randint(256, (2, 9))
    state = model.initial_state(2)
    for _ in range(3):
        _, state = model(ids, state)
    for _ in range(AFTER - 1):
        _, state = model(ids[:, :1], state)
    assert not made
    for _ in range(SHARES):
        _, state = model(ids[:, :1], state)
    (blocks,) = made
    assert blocks.spans == all_of(model)
    assert blocks.asked == [2] * 50


def test_weights_that_lie_elsewhere_are_looked_for_now_and_then(made):
    model = ssmzoo.build("mamba2-tiny")
    for _ in range(AFTER + AGAIN):
        settling.settle(model)
    assert len(made) == 1
    ssmzoo.quantize(model, "int8")
    for _ in range(AGAIN):
        settling.settle(model)
    assert len(made) == 2
    assert made[1].spans == all_of(model) != made[0].spans


def test_nothing_keeps_a_model_alive(made):
    model = ssmzoo.build("mamba2-tiny")
    settling.settle(model)
    before = len(settling._courses)
    del model
    assert len(settling._courses) == before - 1


@torch.inference_mode()
@pytest.mark.parametrize("scheme", [None, "int8", "int4", torch.bfloat16], ids=str)
def test_outputs_have_the_same_bits(scheme, monkeypatch):
    torch.manual_seed(0)
    model = ssmzoo.build("mamba-130m", n_layers=2, d_model=256, vocab_size=512).eval()
    if isinstance(scheme, str):
        ssmzoo.quantize(model, scheme)
    elif scheme is not None:
        model.to(scheme)
    ids = torch.randint(256, (1, 8))
    runs = []
    for after in (10**9, 2):
        monkeypatch.setattr(settling, "AFTER", after)
        settling._courses.pop(model, None)
        state, logits = model.initial_state(1), []
        for _ in range(SHARES + 8):
            y, state = model(ids[:, :1], state)
            logits.append(y)
        runs.append(torch.cat(logits))
    assert torch.equal(*runs)
    assert settling._courses[model].spans == all_of(model)


def test_weights_of_a_file_are_read_into_pages_that_were_asked_for(tmp_path, monkeypatch):
    model, asked = ssmzoo.build("mamba2-tiny"), []
    ssmzoo.save(model, tmp_path)
    monkeypatch.setattr(tensors, "ask", lambda tensor: asked.append(tensor.data_ptr()))
    loaded = ssmzoo.build(tmp_path)
    assert {tensor.data_ptr() for tensor in loaded.state_dict().values()} <= {*asked}


def test_a_model_that_is_timed_is_in_the_middle_of_a_text(made):
    model = ssmzoo.build("mamba2-tiny").eval()
    models.ours(model, torch.zeros(1, 5, dtype=torch.long), models.DECODING)
    assert sum(made[0].asked) == 100
