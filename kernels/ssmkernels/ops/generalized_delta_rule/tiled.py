"""The general delta rule in chunks of matrix products, in PyTorch, with a backward pass of its own.

Within a chunk of c tokens that begins with the state S, let G_i = g_1 + … + g_i be the summed log decays of each key
channel. What token i reads, u_i = S_{i-1}ᵀ a_i, depends on what earlier tokens of the chunk read::

    (x, y)_ij = Σ x_i y_j exp(G_i - G_j)  for j ≤ i          pairs, with the decay from token j to token i
    (x, y)⁻_ij = Σ x_i y_j exp(G_{i-1} - G_j)  for j < i     as a sees them, before the decay of its own token

    U  = (I - (a, b)⁻)⁻¹ (e^{G_{i-1}} a S + (a, k)⁻ V)        a triangular system
    O  = scale · (e^G q S + (q, b) U + (q, k) V)
    S' = e^{G_c} S + (e^{G_c - G} b)ᵀ U + (e^{G_c - G} k)ᵀ V

No exponent is positive, and sums of decays are never differences of longer sums, so that decays down to -∞ are safe.
The backward pass goes through the chunks from the last to the first. It computes the states before them again, of
which it keeps every ``KEPT``-th, and those of ``KEPT`` chunks at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.packing import pad
from ssmkernels.core.validate import precision
from ssmkernels.ops.generalized_delta_rule.reference import scale_of

CHUNK = 16  # tokens; the decays of all pairs take as much memory as 16 tokens' states of 16 values each
KEPT = 4  # chunks between kept states
NAMES = ("q", "k", "v", "a", "b", "log_decay")


class Chunk(NamedTuple):
    """One chunk of all heads: queries, keys, a, b and the log decays (s h c k), values (s h c v)."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    g: Tensor


class Parts(NamedTuple):
    """What both passes make of a chunk, with the decays of single tokens and of pairs."""

    since: Tensor  # e^{G_i}, (s h c k)
    before: Tensor  # e^{G_{i-1}}
    until: Tensor  # e^{G_c - G_i}
    decay: Tensor  # e^{G_i - G_j} for j ≤ i, else 0, (s h c c k)
    decay_a: Tensor  # e^{G_{i-1} - G_j} for j < i, else 0
    ab: Tensor  # (a, b)⁻, (s h c c)
    ak: Tensor
    qb: Tensor
    qk: Tensor
    U: Tensor  # (s h c v)


def forward(a: Any, save: bool) -> tuple[Tensor, Tensor]:
    state, scale, outputs = _initial(a), scale_of(a.q, a.scale), []
    for chunk in _chunks(a):
        parts = _parts(chunk, state)
        outputs.append(scale * ((parts.since * chunk.q) @ state + parts.qb @ parts.U + parts.qk @ chunk.v))
        state = _after(chunk, parts, state)
    return _joined(a, outputs, a.v.shape[3]).to(a.q.dtype), state


def backward(a: Any, saved: Any, grads: Any) -> dict[str, Tensor | None]:
    chunks, scale = _chunks(a), scale_of(a.q, a.scale)
    do = [scale * part for part in _cut(_rows(a, grads.o.to(precision(a.q))))]
    dS = torch.zeros_like(_initial(a)) if grads.final_state is None else grads.final_state
    kept: list[Tensor] = []
    state = _initial(a)
    for i, chunk in enumerate(chunks):
        kept += [state] if i % KEPT == 0 else []
        state = _after(chunk, _parts(chunk, state), state)
    found: list[Chunk] = []
    for start in reversed(range(0, len(chunks), KEPT)):
        states = [kept.pop()]
        segment = chunks[start : start + KEPT]
        for chunk in segment[:-1]:
            states.append(_after(chunk, _parts(chunk, states[-1]), states[-1]))
        for i in reversed(range(len(segment))):
            gradients, dS = _chunk_backward(segment[i], states[i], do[start + i], dS)
            found.append(gradients)
    found.reverse()
    columns = {name: [chunk[i] for chunk in found] for i, name in enumerate(NAMES)}
    sizes = {name: (a.v if name == "v" else a.q).shape[3] for name in NAMES}
    return {"initial_state": dS, **{name: _joined(a, parts, sizes[name]) for name, parts in columns.items()}}


def _chunk_backward(chunk: Chunk, S: Tensor, do: Tensor, dS: Tensor) -> tuple[Chunk, Tensor]:
    """The gradients of a chunk and of the state before it, from those of its scaled outputs and the state after."""
    q, k, v, a, b, _ = chunk
    p = _parts(chunk, S)
    b_until, k_until = p.until * b, p.until * k
    dU = p.qb.mT @ do + b_until @ dS
    dR = _solve(p.ab.mT, dU, upper=True)  # of the triangular system's right side
    dv = p.ak.mT @ dR + p.qk.mT @ do + k_until @ dS
    dab, dak = (dR @ p.U.mT).tril(-1), (dR @ v.mT).tril(-1)
    dqb, dqk = (do @ p.U.mT).tril(), (do @ v.mT).tril()

    def over_later(weight: Tensor, decay: Tensor, x: Tensor) -> Tensor:
        """Σ_i weight_ij decay_ij x_i, (s h c k)."""
        return torch.einsum("shij,shijk,shik->shjk", weight, decay, x)

    def over_earlier(weight: Tensor, decay: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("shij,shijk,shjk->shik", weight, decay, x)

    dq = p.since * (do @ S.mT) + over_earlier(dqb, p.decay, b) + over_earlier(dqk, p.decay, k)
    da = p.before * (dR @ S.mT) + over_earlier(dab, p.decay_a, b) + over_earlier(dak, p.decay_a, k)
    db_until, dk_until = p.until * (p.U @ dS.mT), p.until * (v @ dS.mT)
    db = db_until + over_later(dqb, p.decay, q) + over_later(dab, p.decay_a, a)
    dk = dk_until + over_later(dqk, p.decay, q) + over_later(dak, p.decay_a, a)
    dg = _decay_gradient(chunk, p, (dqb, dqk, dab, dak))
    whole = p.since[:, :, -1]
    dg = dg + _from(q * p.since * (do @ S.mT)) + _from(F.pad((a * p.before * (dR @ S.mT))[:, :, 1:], (0, 0, 0, 1)))
    dg = dg + _before(b * db_until + k * dk_until) + (whole * (S * dS).sum(-1))[:, :, None]
    dS = whole[..., None] * dS + (p.before * a).mT @ dR + (p.since * q).mT @ do
    return Chunk(dq, dk, dv, da, db, dg), dS


def _decay_gradient(chunk: Chunk, p: Parts, dpairs: tuple[Tensor, ...]) -> Tensor:
    """What pairs of tokens give to the gradient of g_t: the sum over all whose decay is over token t, (s h c k).

    A difference of the sums over all pairs before and after t would lose the digits of those that hardly matter.
    """
    q, k, _, a, b, _ = chunk
    dqb, dqk, dab, dak = (d[..., None] for d in dpairs)
    b, k = b[:, :, None], k[:, :, None]
    pairs = p.decay * q[:, :, :, None] * (dqb * b + dqk * k)  # (s h i j k): over j + 1, …, i
    pairs_a = p.decay_a * a[:, :, :, None] * (dab * b + dak * k)  # over j + 1, …, i - 1
    pairs = pairs + F.pad(pairs_a[:, :, 1:], (0, 0, 0, 0, 0, 1))
    later = pairs.flip(2).cumsum(2).flip(2)  # sums over i ≥ t
    earlier = torch.ones(*later.shape[2:4], dtype=torch.bool, device=later.device).tril(-1)[..., None]
    return torch.where(earlier, later, 0).sum(3)


def _from(x: Tensor) -> Tensor:
    """x (s h c k) → at each token the sum from it on."""
    return x.flip(2).cumsum(2).flip(2)


def _before(x: Tensor) -> Tensor:
    """x (s h c k) → at each token the sum of the earlier ones."""
    return F.pad(x.cumsum(2)[:, :, :-1], (0, 0, 1, 0))


def _parts(chunk: Chunk, S: Tensor) -> Parts:
    q, k, v, a, b, g = chunk
    c = g.shape[2]
    sums = _segment_sums(g)  # (s h i j k): g_{j+1} + … + g_i
    lower = torch.ones(c, c, dtype=torch.bool, device=g.device).tril()[..., None]
    decay = torch.where(lower, torch.exp(sums), 0)
    # As a sees a pair: the decay up to the token before
    decay_a = F.pad(decay[:, :, :-1], (0, 0, 0, 0, 1, 0))
    since = torch.exp(g.cumsum(2))
    before = F.pad(since[:, :, :-1], (0, 0, 1, 0), value=1.0)
    until = decay[:, :, -1]

    def pairs(x: Tensor, y: Tensor, between: Tensor) -> Tensor:
        return torch.einsum("shik,shjk,shijk->shij", x, y, between)

    ab, ak = pairs(a, b, decay_a), pairs(a, k, decay_a)
    qb, qk = pairs(q, b, decay), pairs(q, k, decay)
    U = _solve(ab, (before * a) @ S + ak @ v, upper=False)
    return Parts(since, before, until, decay, decay_a, ab, ak, qb, qk, U)


def _after(chunk: Chunk, p: Parts, S: Tensor) -> Tensor:
    """The state after a chunk."""
    return p.since[:, :, -1, :, None] * S + (p.until * chunk.b).mT @ p.U + (p.until * chunk.k).mT @ chunk.v


def _solve(ab: Tensor, x: Tensor, upper: bool) -> Tensor:
    """(I - ab)⁻¹ x, for strictly triangular ab."""
    return torch.linalg.solve_triangular(-ab, x, upper=upper, unitriangular=True)


def _segment_sums(g: Tensor) -> Tensor:
    """g (s h c k) → (s h i j k): g_{j+1} + … + g_i for i > j, 0 elsewhere."""
    c = g.shape[2]
    later = torch.ones(c, c, dtype=torch.bool, device=g.device).tril(-1)[..., None]
    return torch.where(later, g[:, :, :, None], 0).cumsum(2)


def _initial(a: Any) -> Tensor:
    zeros = torch.zeros_like(a.declared.outputs(a)[1])
    return zeros if a.initial_state is None else a.initial_state.clone()


def _chunks(a: Any) -> list[Chunk]:
    """The arguments in chunks, padded by tokens that leave the state as it is."""
    wide = precision(a.q)
    given = [getattr(a, name) for name in NAMES]
    timed = (torch.zeros_like(a.q) if x is None else x for x in given)
    return [Chunk(*parts) for parts in zip(*(_cut(_rows(a, x.to(wide))) for x in timed), strict=True)]


def _rows(a: Any, x: Tensor) -> Tensor:
    """x (b l h c) → a row a sequence, (s h l c), zeros where there is no token."""
    if a.cu_seqlens is not None:
        index, mask = pad(a.cu_seqlens)
        x = torch.where(mask[..., None, None], x[0, index], 0)
    return x.transpose(1, 2)


def _cut(x: Tensor) -> list[Tensor]:
    """(s h l c) → chunks of CHUNK tokens, (s h CHUNK c); zeros beyond the last."""
    return list(F.pad(x, (0, 0, 0, -x.shape[2] % CHUNK)).split(CHUNK, dim=2)) if x.shape[2] else []


def _joined(a: Any, parts: list[Tensor], width: int) -> Tensor:
    """Chunks (s h CHUNK c) → (b l h c), as the arguments are."""
    batch, length, heads = a.q.shape[:3]
    if not parts:
        return a.q.new_zeros(batch, length, heads, width, dtype=precision(a.q))
    x = torch.cat(parts, dim=2).transpose(1, 2)
    if a.cu_seqlens is None:
        return x[:, :length].contiguous()
    _, mask = pad(a.cu_seqlens)
    return x[:, : mask.shape[1]][mask][None]
