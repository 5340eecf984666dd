"""``State.concatenate``: sequences of several states go on side by side as each would alone; and states put away."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import ssmzoo
from ssmzoo.cache import PagedCache
from ssmzoo.cache.elastic import ElasticPages, elastic
from ssmzoo.mixers.mamba import MambaState
from ssmzoo.state import State, closing

SMALL = runpy.run_path(str(Path(__file__).with_name("small_mixers.py")))["SMALL"]
VOCAB = 19
MIXERS = {
    "mamba": SMALL["mamba"],
    "rwkv7": SMALL["rwkv7"],
    "attention": SMALL["attention"],
    "local": {**SMALL["attention"], "kind": "attention", "window": 4},
    "paged": {**SMALL["attention"], "kind": "attention", "page_size": 3, "d_conv": 3},
    "hidden": {**SMALL["attention"], "kind": "attention", "cache": "hidden", "rope": False},
    "mla": SMALL["mla"],
    "longformer": {**SMALL["longformer"], "bidirectional": False, "n_global": 1},
    "moba": SMALL["moba"],
    "nsa": SMALL["nsa"],
    "hash": SMALL["hash"],
    "hyena": SMALL["hyena"],
    "both": {"kind": "parallel", "branches": {"mamba": SMALL["mamba"], "attention": SMALL["attention"]}},
}


def build(name, **options):
    torch.manual_seed(0)
    config = {"d_model": 16, "n_layers": 1, "vocab_size": VOCAB, "pattern": [name], "mixers": {name: MIXERS[name]}}
    return ssmzoo.build({**config, **options}).double().eval()


def tokens(*shape, seed):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def beginning(model, in_pages):
    if not in_pages:
        return model.initial_state(1)
    with elastic(4, 10**6):
        return model.initial_state(1)


def alone(model, ids):
    """The outputs of the last token of ids (l), by itself."""
    return model(ids[None])[0, -1]


@pytest.mark.parametrize("in_pages", [False, True], ids=["as they are", "elastic"])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_rows_go_on_as_alone(name, in_pages):
    """States of several lengths join, a further one comes later, the longest leaves, and all go on."""
    model = build(name)
    start = beginning(model, in_pages)
    rows = [tokens(length, seed=length) for length in (14, 3, 9)]
    states = [model(row[None], start.clone())[1] for row in rows]
    state = State.concatenate(states[:2])
    going = [0, 1]
    for step in range(7):
        if step == 2:
            state, going = State.concatenate([state, states[2]]), [0, 1, 2]
        if step == 4:
            state, going = state.select([1, 2]), [1, 2]
        new = tokens(len(going), 1, seed=100 + step)
        out, state = model(new, state)
        for i, row in enumerate(going):
            rows[row] = torch.cat([rows[row], new[i]])
            torch.testing.assert_close(out[i, 0], alone(model, rows[row]), rtol=1e-9, atol=1e-10)
    assert state.n_sequences == 2


@pytest.mark.parametrize("in_pages", [False, True], ids=["as they are", "elastic"])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_closing_up_is_a_selection_in_the_same_memory(name, in_pages):
    model = build(name)
    start = beginning(model, in_pages)
    state = State.concatenate([model(tokens(1, length, seed=length), start.clone())[1] for length in (9, 3, 14, 5, 4)])
    rows = closing([0, 2, 4])
    assert rows == [0, 4, 2]
    chosen = state.select(rows)
    closed = state.closed_up(rows)
    assert closed.n_sequences == 3
    for step in range(3):
        new = tokens(3, 1, seed=step)
        expected, chosen = model(new, chosen)
        found, closed = model(new, closed)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_last_rows_fill_the_gaps():
    assert closing([]) == []
    assert closing([3]) == [3]
    assert closing([0, 1, 2]) == [0, 1, 2]
    assert closing([1, 2, 5, 6]) == [6, 1, 2, 5]


def test_memory_that_rows_share_is_not_written_to():
    """Several rows that are one in memory, and numbers of a row that are."""
    for held in (torch.arange(3.0)[:, None].expand(3, 4), torch.arange(4.0).expand(3, 4)):
        before = held.clone()
        closed = MambaState(held, held.clone()).closed_up([0, 2])
        assert torch.equal(closed.conv, before[[0, 2]])
        assert torch.equal(held, before)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_put_away_and_brought_back(name):
    model = build(name)
    with elastic(4, 10**6):
        start = model.initial_state(1)
    ids = tokens(11, seed=1)
    _, state = model(ids[None], start.clone())
    stored = state.stored()
    assert not any(isinstance(part, PagedCache) for part in stored.nested())
    skeleton, tensors = stored.to("meta"), stored.tensors()
    back = start.restored(skeleton.with_tensors(iter(tensors)))
    for seed in (2, 3):
        new = tokens(1, seed=seed)
        ids = torch.cat([ids, new])
        out, back = model(new[None], back)
        torch.testing.assert_close(out[0, 0], alone(model, ids), rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_learned_positions():
    model = build("mamba", learned_positions=32)
    rows = [tokens(length, seed=length) for length in (5, 2)]
    state = State.concatenate([model(row[None], model.initial_state(1))[1] for row in rows])
    assert state.positions.longest == 5
    new = tokens(2, 1, seed=9)
    out, _ = model(new, state)
    for i, row in enumerate(rows):
        torch.testing.assert_close(out[i, 0], alone(model, torch.cat([row, new[i]])), rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_pages_of_another_pool_are_copied():
    model = build("paged")
    rows = [tokens(length, seed=length) for length in (5, 8)]
    states = [model(row[None], model.initial_state(1))[1] for row in rows]
    first, second = (next(p for p in state.nested() if isinstance(p, PagedCache)) for state in states)
    joined = State.concatenate([first, second])
    assert joined.pages.pool is first.pages.pool is not second.pages.pool
    assert first.pages.pool.in_use == 2 + 3
    del joined
    assert first.pages.pool.in_use == 2


def test_a_pool_takes_memory_for_pages_in_use():
    """A page that nobody holds reads as zeros again: the system has taken its memory back."""
    with elastic(64, 2**24):
        cache = build("attention").initial_state(1).layers[0]
    pool = cache.pages.pool
    assert isinstance(pool, ElasticPages)
    if pool.reserved is None:
        pytest.skip("needs a system that takes single pages of memory back (madvise)")
    address = pool.reserved[0][0].data_ptr()
    x = torch.ones(1, 200, 2, 8, dtype=torch.float64)
    held = cache.clone()
    held.append(x, x, False)
    assert pool.in_use == 4
    assert pool.keys.data_ptr() == address
    page = held.pages.rows[0][1]
    assert pool.keys[page].sum() == 64 * 16
    del held
    assert pool.in_use == 0
    assert pool.keys[page].sum() == 0


def test_refusals():
    mamba, attention = build("mamba").initial_state(1), build("attention").initial_state(1)
    with pytest.raises(ValueError, match=r"`states` must hold at least one state; got none"):
        State.concatenate([])
    with pytest.raises(TypeError, match=r"all be of one kind; got MambaState and KVCache"):
        State.concatenate([mamba, attention])
    windows = [ssmzoo.build_mixer("attention", 16, head_dim=8, window=w).initial_state(1) for w in (3, 5)]
    with pytest.raises(ValueError, match=r"`keep` must be the same in all `states`; got \[2, 4\]"):
        State.concatenate(windows)
