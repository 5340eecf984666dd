"""Mixers whose queries select blocks: their equations query by query, what they leave out, states, and errors."""

import math

import pytest
import torch

import ssmzoo

pytestmark = pytest.mark.mixer("moba", "nsa")

D_MODEL = 32
NSA = {
    "head_dim": 8,
    "n_kv_heads": 2,
    "compress_block": 4,
    "compress_stride": 2,
    "block_size": 4,
    "n_selected": 3,
    "n_initial": 1,
    "n_local": 1,
    "window": 5,
    "rope": False,
}
MOBA = {"head_dim": 8, "n_kv_heads": 2, "block_size": 3, "top_k": 2, "rope": False}


def make(name, options):
    torch.manual_seed(0)
    return ssmzoo.build_mixer(name, D_MODEL, **options).double()


def inputs(length, batch=1):
    return torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads(x, projection):
    return projection(x).unflatten(-1, (-1, 8))[0]  # (l h d)


def over(q, keys, values):
    return (keys @ q / math.sqrt(8)).softmax(0) @ values


def test_moba_query_by_query():
    mixer, x = make("moba", MOBA), inputs(20)
    q, k, v = heads(x, mixer.q_proj), heads(x, mixer.k_proj), heads(x, mixer.v_proj)
    out = torch.zeros(20, 4, 8, dtype=torch.float64)
    for t in range(20):
        own = t // 3
        for h in range(4):
            keys, values = k[:, h // 2], v[:, h // 2]
            scores = [(q[t, h] @ keys[3 * c : 3 * c + 3].mean(0)).item() for c in range(own)]
            chosen = {own, *sorted(range(own), key=lambda c: -scores[c])[:1]}
            seen = [j for j in range(t + 1) if j // 3 in chosen]
            out[t, h] = over(q[t, h], keys[seen], values[seen])
    torch.testing.assert_close(mixer(x), mixer.out_proj(out.flatten(1))[None])


def test_nsa_query_by_query():
    """Every sum of equation 9 is written as a loop, over compressed tokens that may not be there."""
    mixer, x, length = make("nsa", NSA), inputs(30), 30
    q, k, v = heads(x, mixer.q_proj), heads(x, mixer.k_proj), heads(x, mixer.v_proj)
    gates = torch.sigmoid(mixer.gate_proj(x))[0].view(length, 3, 4)
    out = torch.zeros(length, 4, 8, dtype=torch.float64)
    for group in range(2):
        compressed = [
            [
                phi.down(torch.nn.functional.gelu(phi.up((kind[s : s + 4, group] + phi.places[group]).flatten())))
                for s in range(0, length - 3, 2)
            ]
            for kind, phi in ((k, mixer.k_compress), (v, mixer.v_compress))
        ]
        k_c, v_c = (torch.stack(list_) for list_ in compressed)
        for t in range(length):
            there = [i for i in range(len(k_c)) if 2 * i + 3 <= t]
            weights = {}
            for h in (2 * group, 2 * group + 1):
                for i, p in zip(there, (k_c[there] @ q[t, h] / math.sqrt(8)).softmax(0).tolist(), strict=True):
                    weights[i] = weights.get(i, 0.0) + p
            own = t // 4
            scores = {j: sum(weights.get(2 * j + m - n, 0.0) for m in (0, 1) for n in (0, 1)) for j in range(own + 1)}
            forced = {0, own}
            rest = sorted(set(scores) - forced, key=lambda j: -scores[j])
            chosen = forced | set(rest[: 3 - len(forced)])
            seen = [j for j in range(t + 1) if j // 4 in chosen]
            recent = slice(max(0, t - 4), t + 1)
            for h in (2 * group, 2 * group + 1):
                if there:
                    out[t, h] += gates[t, 0, h] * over(q[t, h], k_c[there], v_c[there])
                out[t, h] += gates[t, 1, h] * over(q[t, h], k[seen, 2 + group], v[seen, 2 + group])
                out[t, h] += gates[t, 2, h] * over(q[t, h], k[recent, 4 + group], v[recent, 4 + group])
    torch.testing.assert_close(mixer(x), mixer.out_proj(out.flatten(1))[None])


def test_with_all_blocks_moba_is_attention():
    mixer, x = make("moba", MOBA | {"top_k": 7}), inputs(20, batch=2)
    dense = make("attention", {"head_dim": 8, "n_kv_heads": 2, "rope": False})
    dense.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), dense(x))


@pytest.mark.parametrize(("name", "options"), [("moba", MOBA), ("nsa", NSA)])
@torch.no_grad()
def test_a_shorter_sequence_goes_on_after_a_longer_one_has_left(name, options):
    mixer, x = make(name, options), inputs(30)
    state = mixer.initial_state(2)
    _, state = mixer(torch.cat([x[:, :20], x[:, :10]], dim=1), state, cu_seqlens=torch.tensor([0, 20, 30]).int())
    state = state.select([1])
    for t in range(10, 30):
        y, state = mixer(x[:, t : t + 1], state)
        torch.testing.assert_close(y, mixer(x[:, : t + 1])[:, -1:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), [("moba", MOBA), ("nsa", NSA)])
def test_summaries_are_made_once_for_each_stretch(name, options):
    """In chunks of any size, for sequences of any lengths, the state holds what the whole sequence gives."""
    mixer, x = make(name, options), inputs(23, batch=3)
    with torch.no_grad():
        _, whole = mixer(x, mixer.initial_state(3))
        state = mixer.initial_state(3)
        for chunk in x.split((1, 7, 2, 5, 8), dim=1):
            _, state = mixer(chunk, state)
        torch.testing.assert_close(state.summaries, whole.summaries)
        lengths = (5, 23, 12)
        borders = torch.tensor([0, 5, 28, 40], dtype=torch.int32)
        packed = torch.cat([x[i, :length] for i, length in enumerate(lengths)])[None]
        _, uneven = mixer(packed, mixer.initial_state(3), cu_seqlens=borders)
        for t in range(3):
            _, uneven = mixer(x[:, t : t + 1], uneven)
    for i, length in enumerate(lengths):
        together = torch.cat([x[i, :length], x[i, :3]])[None]
        with torch.no_grad():
            _, alone = mixer(together, mixer.initial_state(1))
        count = mixer.complete(length + 3)
        torch.testing.assert_close(uneven.summaries[i, :count], alone.summaries[0])


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("moba", {"block_size": 0}, "Moba: `block_size` must be at least 1; got 0"),
        ("moba", {"top_k": 0}, "Moba: `top_k` must be at least 1; got 0"),
        ("moba", {"n_kv_heads": 3}, "Moba: `n_kv_heads` must divide the 4 heads; got 3"),
        ("moba", {"rope": True, "rope_base": 1.0}, "`rope_base` must be above 1; got 1.0"),
        ("nsa", {"compress_stride": 3}, "`compress_stride` must divide `compress_block`=4; got 3"),
        ("nsa", {"block_size": 5}, "`compress_stride` must divide `block_size`=5; got 2"),
        ("nsa", {"n_selected": 1}, r"`n_selected` must be at least n_initial \+ n_local, 2; got 1"),
        ("nsa", {"head_dim": 5, "n_heads": 2, "rope": True}, "`head_dim` must be even, or `rope` false; got 5"),
        ("nsa", {"compression": "max"}, "`compression` of mixer .nsa. must be"),
    ],
)
def test_errors(name, options, told):
    with pytest.raises((TypeError, ValueError), match=told):
        make(name, {"moba": MOBA, "nsa": NSA}[name] | options)
