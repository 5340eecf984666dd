"""The general delta rule in Triton, in chunks of matrix products: the launches, forward and backward.

Pairs of tokens, and the gradients of queries and keys, are those of linear attention, whose kernels run once for each
of q and a with each of b and k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.triton_support import interpreting, next_power_of_2
from ssmkernels.ops.generalized_delta_rule.reference import scale_of
from ssmkernels.ops.linear_attention.triton_channels import Chunks, Gradients, together, value_tiles
from ssmkernels.ops.ssd.triton_arguments import wide

PACKAGE = "ssmkernels.ops.generalized_delta_rule"
WIDEST = 128  # keys of a state that fits into registers
NUMBERS = 2048  # of a state that a program has in registers; in float32, where products need more beside it, half


class Rule:
    """One call's chunks, and what passes between the tokens of each.

    Attributes:
        solved, ak, qb, qk: float32 (chunks h Q Q), as the kernels' module says.
    """

    def __init__(self, a: Any):
        self.a, self.scale = a, float(scale_of(a.q, a.scale))
        # What is erased is a difference of nearly equal numbers: no factor is rounded to half precision
        self.chunks = chunks = Chunks(a, _tokens(a), "float32")
        self.qb, self.qk = (chunks.pairs(a.q, x, self.scale, False) for x in (a.b, a.k))
        ab, self.ak = (chunks.pairs(a.a, x, 1.0, True) for x in (a.b, a.k))
        self.solved = torch.empty_like(ab)
        chunks.run("solve", chunks.count * chunks.h, 4, chunks.dims, PACKAGE, ab=ab, solved=self.solved)

    def carry(self, kernel: str, **fields: Any) -> None:
        """A kernel that goes through each sequence, for some columns of each head's state."""
        a, chunks = self.a, self.chunks
        rows = max(16, next_power_of_2(chunks.k))
        most = NUMBERS // 2 if a.q.dtype == torch.float32 else NUMBERS
        block = max(16, min(next_power_of_2(chunks.v), most // rows))
        dims = chunks.dims._replace(BLOCK_K=rows, BLOCK_V=block)
        own = {**together(q=a.q, k=a.k, a=a.a, b=a.b), "decay": chunks.decay, "scale": self.scale}
        own |= {"qb": self.qb, "qk": self.qk, "ak": self.ak, "solved": self.solved}
        chunks.run(kernel, chunks.sequences * chunks.h * value_tiles(dims), 8, dims, PACKAGE, **own, **fields)

    def walk(self, final: Tensor | None, o: Tensor | None, U: Tensor | None, states: Tensor | None) -> None:
        a = self.a
        outputs = {"final": final, "o": o, "U": U, "states": states}
        self.carry("walk", **together(v=a.v), initial=wide(a.initial_state), **outputs)


def _tokens(a: Any) -> int:
    """Of a chunk, whose squares are in registers beside the state."""
    if interpreting():
        return 32
    return 16 if a.q.dtype == torch.float32 else 32


def forward(a: Any, o: Tensor, final_state: Tensor) -> None:
    Rule(a).walk(final_state, o, None, None)


def backward(a: Any, grads: Any) -> dict[str, Tensor | None]:
    """What was read and the states are computed again, and not kept."""
    rule, do, dv = Rule(a), grads.o, a.v.new_empty(a.v.shape)
    chunks, scale = rule.chunks, rule.scale
    U, dR = (a.v.new_empty(a.v.shape, dtype=torch.float32) for _ in range(2))
    states, dstates = chunks.empty(chunks.k, chunks.v), chunks.empty(chunks.k, chunks.v)
    rule.walk(None, None, U, states)
    dinitial = U.new_empty(chunks.sequences, chunks.h, chunks.k, chunks.v)
    made = {"dR": dR, "dv": dv, "dstates": dstates, "dfinal": wide(grads.final_state), "dinitial": dinitial}
    rule.carry("walk_backward", **together(do=do), **made)
    found = Gradients(chunks)
    dq, dk = found.of_states(a.q, a.k, a.v, do, states, dstates, scale, shift=False)
    da, db = found.of_states(a.a, a.b, U, dR, states, dstates, 1.0, shift=True, around=False)
    for x, of_x, out, factor, shift in ((a.q, dq, do, scale, False), (a.a, da, dR, 1.0, True)):
        for y, of_y, values in ((a.k, dk, a.v), (a.b, db, U)):
            found.of_pairs(x, y, chunks.weights(values, out, factor), of_x, of_y, shift)
    initial = None if a.initial_state is None else dinitial
    given = {"q": dq, "k": dk, "v": dv, "a": da, "b": db}
    return {**given, "log_decay": found.decay, "initial_state": initial}
