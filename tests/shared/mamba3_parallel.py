"""Mamba-3 as masked attention with complex numbers, in float64: what its recurrence is held against.

Written from arXiv 2603.15569 without looking at the recurrence's code: the mask is the product of a lower triangle of
decays (1-semiseparable) and a matrix with two diagonals, γ and α (1 - λ) Δ, which is the trapezoidal rule; scores are
real parts of products of complex keys and queries, each pair of whose dimensions is one number that turns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def as_complex(maps, count, interleaved):
    """(… n) → the pairs that turn as complex numbers (… a), and the other dimensions, numbered, (… n - 2a)."""
    n = maps.shape[-1]
    real = [2 * i if interleaved else i for i in range(count)]
    imaginary = [i + 1 if interleaved else i + n // 2 for i in real]
    rest = [i for i in range(n) if i not in {*real, *imaginary}]
    return torch.complex(maps[..., real], maps[..., imaginary]), maps[..., rest], (real, imaginary, rest)


def as_real(pairs, rest, places):
    out = pairs.real.new_zeros(*rest.shape[:-1], sum(map(len, places)))
    for part, place in zip((pairs.real, pairs.imag, rest), places, strict=True):
        out[..., place] = part
    return out


def mamba3_parallel(
    x, dt, A, B, C, trap, angles, B_bias=None, C_bias=None, D=None, z=None, interleaved=True,
    initial_state=None, initial_angle=None, initial_key=None, initial_value=None,
):  # fmt: skip
    """The arguments of ``mamba3_scan`` → y and the states h, θ (not reduced), k and v after the last step."""
    b, l, r, h, p = x.shape
    n, count = B.shape[-1], angles.shape[-1]
    theta = (dt[..., None] * angles[:, :, None]).cumsum(1)  # (b l h a)
    if initial_angle is not None:
        theta = theta + initial_angle[:, None]
    B, C = (t.repeat_interleave(h // t.shape[3], dim=3) for t in (B, C))  # (b l r h n)
    B, C = (t if bias is None else t + bias.transpose(0, 1) for t, bias in ((B, B_bias), (C, C_bias)))
    turn = torch.polar(torch.ones_like(theta), theta)[:, :, None]
    (Bc, B_rest, places), (Cc, C_rest, _) = (as_complex(t, count, interleaved) for t in (B, C))
    keys, queries = Bc * turn, Cc * turn
    first_k = x.new_zeros(b, r, h, n) if initial_key is None else initial_key
    first_v = x.new_zeros(b, r, h, p) if initial_value is None else initial_value
    first_c, first_rest, _ = as_complex(first_k, count, interleaved)
    keys = torch.cat([first_c[:, None], keys], dim=1)  # one more, as are values and columns of the mask
    rests = torch.cat([first_rest[:, None], B_rest], dim=1)
    values = torch.cat([first_v[:, None], x], dim=1)
    scores = torch.einsum("birha,bjsha->bhirjs", queries.conj(), keys).real
    scores = scores + torch.einsum("birhn,bjshn->bhirjs", C_rest, rests)

    alpha = torch.exp(dt * A).mT  # (b h l)
    decays = torch.stack(
        [
            torch.stack([alpha[..., j + 1 : i + 1].prod(-1) if i >= j else 0 * alpha[..., 0] for j in range(l)], dim=-1)
            for i in range(l)
        ],
        dim=-2,
    )
    own, late = (trap * dt).mT, alpha * ((1 - trap) * dt).mT
    bands = F.pad(torch.diag_embed(own), (1, 0)) + F.pad(torch.diag_embed(late), (0, 1))  # (b h l l+1)
    mask = decays @ bands
    y = torch.einsum("bhij,bhirjs,bjshp->birhp", mask, scores, values)
    whole = alpha.cumprod(-1)  # (b h l)
    real_keys, real_queries = as_real(keys, rests, places), as_real(queries, C_rest, places)
    state = torch.einsum("bhj,bjshp,bjshn->bhpn", mask[:, :, -1], values, real_keys)
    if initial_state is not None:
        y = y + torch.einsum("bhi,bhpn,birhn->birhp", whole, initial_state, real_queries)
        state = state + whole[..., -1, None, None] * initial_state
    y = y if D is None else y + D[:, None] * x
    y = y if z is None else y * F.silu(z)
    return y, state, theta[:, -1], real_keys[:, -1], x[:, -1]
