"""The recurrent view of a linear time-invariant system: h_t = Ā h_{t-1} + B̄ u_t, y_t = C h_t, many tokens at a time.

:func:`run_chunk` takes a state through a chunk by matrix products over blocks of about √l tokens. With r tokens a
block, t = q r + i and h the state before the chunk,

    what the state adds to the outputs    C Ā^{t+1} h         = (C Ā^i) (Ā^{q r} Ā h)
    what the inputs add to the state      Σ_t Ā^{l-1-t} B̄ u_t = Σ_q Ā^{(Q-1-q) r} Σ_i (Ā^{r-1-i} B̄) u_{q r + i}

are products of tables of r and of Q = l / r rows, each made by doubling: Ā^0 ... Ā^{m-1} times Ā^m are the next m. So
memory is O(l d + d n √l), and the only powers needed are the Ā^{2^k}.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmkernels.core.crossing import crossing, current
from ssmkernels.core.packing import pad


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """A system whose Ā is diagonal; an entry of a complex one stands for itself and its conjugate.

    Rows of states and of maps out of states, ``(d m n)``, are complex where Ā is.

    Attributes:
        A: Ā, ``(d n)``.
        B: B̄, ``(d n)``, in the precision of the states.
    """

    A: Tensor
    B: Tensor

    def enter(self, h: Tensor) -> Tensor:
        """States (s d n) as rows (d s n)."""
        return h.transpose(0, 1)

    def leave(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`enter`."""
        return rows.transpose(0, 1)

    def maps(self, C: Tensor) -> Tensor:
        """C (d c n), of which a state's output is the sum over C h, twice its real part where complex, as rows."""
        return C

    @staticmethod
    def forwards(A: Tensor, rows: Tensor) -> Tensor:
        """A power of Ā times each state."""
        return rows * A[:, None]

    @staticmethod
    def backwards(A: Tensor, rows: Tensor) -> Tensor:
        """Each map times a power of Ā."""
        return rows * A[:, None]

    def square(self, A: Tensor, whole_blocks: bool) -> Tensor:
        """The next power; ``whole_blocks`` says whether A spans a block or more."""
        return A * A

    def products(self, states: Tensor, maps: Tensor) -> Tensor:
        """Every output of states (d m n) by maps (d k n): real, (d m k)."""
        if not states.is_complex():
            return states @ maps.mT
        return torch.cat([states.real, states.imag], -1) @ torch.cat([2 * maps.real, -2 * maps.imag], -1).mT

    def weighted(self, weights: Tensor, states: Tensor) -> Tensor:
        """Sums of states (d k n) by real weights (d m k) → (d m n)."""
        if not states.is_complex():
            return weights @ states
        return torch.complex(*(weights @ torch.cat([states.real, states.imag], -1)).chunk(2, dim=-1))


@dataclasses.dataclass(frozen=True)
class DiagonalStep:
    """One token of a diagonal system. Ā is the sum of two numbers in the precision of the states: rounded to one, it
    would turn each state a little too fast or too slow, and the error would grow with the number of tokens."""

    A: Tensor  # (d n)
    A_rest: Tensor  # (d n)
    B: Tensor  # (d n)

    @classmethod
    def of(cls, system: Diagonal) -> DiagonalStep:
        A = system.A.to(system.B.dtype)
        return cls(A, (system.A - A).to(A.dtype), system.B)

    def step(self, h: Tensor, u: Tensor) -> Tensor:
        """h (s d n) and one token u (s d) → the state after it."""
        return torch.addcmul(torch.addcmul(self.B * u[..., None], self.A_rest, h), self.A, h)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A real system with a matrix Ā for each channel, whose states outside are complex halves h.

    Rows of states are [Re h, Im h], and those of maps [2 Re C, -2 Im C]: ``(d m N)`` with N = 2n.

    Attributes:
        A: Ā, ``(d N N)``.
        B: B̄, ``(d N)``, in the precision of the states.
    """

    A: Tensor
    B: Tensor

    def step(self, h: Tensor, u: Tensor) -> Tensor:
        """h (s d n) and one token u (s d) → the state after it."""
        return self.leave(self.forwards(self.A, self.enter(h)) + self.B[:, None] * u.mT[..., None])

    def enter(self, h: Tensor) -> Tensor:
        """States (s d n) as rows (d s N)."""
        return torch.cat([h.real, h.imag], dim=-1).transpose(0, 1)

    def leave(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`enter`."""
        return torch.complex(*rows.transpose(0, 1).chunk(2, dim=-1))

    def maps(self, C: Tensor) -> Tensor:
        """C (d c n), of which a state's output is twice the real part of the sum over C h, as rows (d c N)."""
        return torch.cat([2 * C.real, -2 * C.imag], dim=-1)

    @staticmethod
    def forwards(A: Tensor, rows: Tensor) -> Tensor:
        """A power of Ā times each state."""
        return rows @ A.mT

    @staticmethod
    def backwards(A: Tensor, rows: Tensor) -> Tensor:
        """Each map times a power of Ā."""
        return rows @ A

    def square(self, A: Tensor, whole_blocks: bool) -> Tensor:
        """The next power. Those of whole blocks are rounded as states are: √l rounding errors at most add up in them,
        and in float32 they cost a fifth."""
        A = A.to(self.B.dtype) if whole_blocks else A
        return A @ A

    def products(self, states: Tensor, maps: Tensor) -> Tensor:
        """Every output of states (d m N) by maps (d k N): (d m k)."""
        return states @ maps.mT

    def weighted(self, weights: Tensor, states: Tensor) -> Tensor:
        """Sums of states (d k N) by weights (d m k) → (d m N)."""
        return weights @ states


def run_chunk(
    system: Diagonal | Dense, C: Tensor, u: Tensor, h: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a state adds to a chunk's outputs, and the state after it.

    Args:
        system: Ā in float64, so that no power of it loses digits.
        C: ``(d c n)``, c outputs for each of d inputs.
        u: ``(s l d)``, in the real precision of h; packed sequences ``(1 l d)`` with ``cu_seqlens``.
        h: the state before, ``(s d n)``.
        cu_seqlens: int32 ``(s + 1)``.

    Returns:
        C Ā^{t+1} h, ``(s l c d)`` or packed ``(1 l c d)``, and the state after, ``(s d n)``.
    """
    if cu_seqlens is None:
        return _run(system, C, u, h, u.shape[1])
    over = current()
    if over is not None:  # the chunk is a part of sequences that are cut over processes
        with crossing(None):
            _, left = run_chunk(system, C, u, torch.zeros_like(h), cu_seqlens)
            before, after = over.carried(h, left, functools.partial(advanced, system))
            return run_chunk(system, C, u, before, cu_seqlens)[0], after
    mask = pad(cu_seqlens)[1]  # (s longest), each row's tokens first
    lengths = cu_seqlens.diff().long()
    place = torch.arange(mask.shape[1], device=u.device) - (mask.shape[1] - lengths)[:, None]
    source = (place.clamp(min=0) + cu_seqlens[:-1, None]).clamp(max=max(u.shape[1] - 1, 0))
    late = torch.where((place >= 0)[..., None], u[0, source], 0)  # each row's tokens last: zeros first change nothing
    inherited, h = _run(system, C, late, h, lengths)
    return inherited[mask][None], h


def advanced(system: Diagonal | Dense, h: Tensor, lengths: Tensor) -> Tensor:
    """A state (s d n) after so many tokens without inputs, int64 (s)."""
    A, state = system.A, system.enter(h)
    for k in range(int(lengths.max()).bit_length()):
        state = _if_bit(lengths, k, system.forwards, A.to(state.dtype), state)
        A = system.square(A, False)
    return system.leave(state)


def _run(system: Diagonal | Dense, C: Tensor, u: Tensor, h: Tensor, lengths: int | Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`run_chunk`, for (s l d) of which a sequence has the last ``lengths`` tokens; its outputs come first."""
    (s, l, d), c = u.shape, C.shape[1]
    if s * l == 0:
        return u.new_zeros(s, l, c, d), h
    inner = (l - 1).bit_length() // 2  # r = 2^inner tokens a block
    blocks = -(-l >> inner)
    outer = (blocks - 1).bit_length()
    A, state = system.A, system.enter(h)
    power = A.to(state.dtype)  # of Ā
    heads = system.forwards(power, state)[:, :, None]  # (d s q n): Ā^{q r + 1} h
    maps = system.maps(C)[:, :, None]  # (d c i n): C Ā^i
    gains = system.B[:, None]  # (d i n): Ā^{r-1-i} B̄
    for k in range(inner):
        maps = torch.cat([maps, _each(system.backwards, power, maps)], dim=2)
        gains = torch.cat([system.forwards(power, gains), gains], dim=1)
        state = _if_bit(lengths, k, system.forwards, power, state)
        A = system.square(A, False)
        power = A.to(state.dtype)
    tails = F.pad(u, (0, 0, (blocks << inner) - l, 0)).permute(2, 0, 1).contiguous()
    tails = tails.view(d, s * blocks, -1)  # (d s·q i)
    tails = system.weighted(tails, gains).unflatten(1, (s, blocks))  # (d s q n): what blocks leave at their end
    levels = max(inner + outer, l.bit_length())
    for k in range(inner, levels):
        if k < inner + outer:
            heads = torch.cat([heads, _each(system.forwards, power, heads)], dim=2)
            tails = tails if tails.shape[2] % 2 == 0 else F.pad(tails, (0, 0, 1, 0))
            tails = _each(system.forwards, power, tails[:, :, 0::2]) + tails[:, :, 1::2]  # of blocks twice as long
        state = _if_bit(lengths, k, system.forwards, power, state)
        if k + 1 < levels:
            A = system.square(A, True)
            power = A.to(state.dtype)
    inherited = system.products(heads[:, :, :blocks].flatten(1, 2), maps.flatten(1, 2)).view(d, s, blocks, c, -1)
    inherited = inherited.permute(1, 2, 4, 3, 0).flatten(1, 2)[:, :l]  # (s l c d)
    return inherited, system.leave(state + tails[:, :, 0])


def _each(function: Callable[[Tensor, Tensor], Tensor], A: Tensor, rows: Tensor) -> Tensor:
    """A function of rows (d m n) on rows (d s q n)."""
    return function(A, rows.flatten(1, 2)).unflatten(1, rows.shape[1:3])


def _if_bit(
    lengths: int | Tensor, k: int, function: Callable[[Tensor, Tensor], Tensor], A: Tensor, rows: Tensor
) -> Tensor:
    """A function of the rows (d s n) of the sequences whose length has bit k; the others as they are."""
    if isinstance(lengths, Tensor):
        return torch.where((lengths >> k & 1).bool()[:, None], function(A, rows), rows)
    return function(A, rows) if lengths >> k & 1 else rows
