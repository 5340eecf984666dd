"""What processors send one another in a training step.

Bytes are those that one processor sends, and as many come in. Over n processors a gather of parts whose sum is S bytes
sends S (n − 1) / n, and so does a scatter of sums; a sum that all get is both (rings: Patarasu and Yuan, doi
10.1016/j.jpdc.2008.09.002). From these:

- data: gradients are summed up once: 2 G (n − 1) / n.
- shard: weights are gathered in the forward pass and again in the backward pass, and gradients scattered as sums:
  3 S (n − 1) / n (ZeRO, arXiv 1910.02054, section 7.2).
- tensor: the outputs of each mixer and MLP are summed up, and in the backward pass the gradients of their inputs: 4
  sums of the residual stream a layer (Megatron-LM, arXiv 1909.08053, section 3), and 2 more where layers are computed
  again.
- states, where sequences are cut: states, decays and last tokens go to all n − 1 others, and in the backward pass their
  gradients come back. What is dealt out by channels, as for long convolutions, is sent once, but for a process's own.
- keys, likewise: what attention sends by the way that it goes (:mod:`ssmzoo.planning.attending`).

Where sequences are cut, gradients of weights are summed up over that dimension too. Layers that are computed again send
nothing of this a second time.
"""

from __future__ import annotations

import dataclasses

from ssmzoo.parallel.gradients import BUCKET
from ssmzoo.planning.devices import Device
from ssmzoo.planning.memory import HALF, WIDE, held
from ssmzoo.planning.mesh import Mesh
from ssmzoo.planning.pieces import Parts, Piece


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one dimension of the mesh.

    Attributes:
        sent: bytes that a processor sends in a step.
        messages: in how many goes.
        link: "node" or "network".
        seconds: for all of it, while nothing else is done.
    """

    sent: float
    messages: float
    link: str
    seconds: float


def traffic(
    parts: Parts, mesh: Mesh, device: Device, precision: str, checkpointing: bool, parameters: float
) -> dict[str, Traffic]:
    """What each dimension of the mesh has to do; those of one processor are left out.

    Args:
        parameters: numbers in the weights that a processor has before they are sharded.
    """
    n_layers = sum(len(piece.layers) for piece in parts.blocks)
    found: dict[str, Traffic] = {}

    def add(name: str, sent: float, messages: float, span: int) -> None:
        link = "node" if span <= device.node else "network"
        found[name] = Traffic(sent, messages, link, device.sending(name, span, sent, messages))

    same = mesh.data * mesh.context  # processors with the same share of the weights
    if same > 1:
        size = parameters / mesh.shard * WIDE
        add("gradients", 2 * size * (same - 1) / same, max(1.0, size / BUCKET), mesh.span("data"))
    if mesh.shard > 1:
        weight = HALF[precision] or WIDE
        share = (mesh.shard - 1) / mesh.shard
        add("shard", parameters * (2 * weight + WIDE) * share, 3.0 * (n_layers + 1), mesh.span("shard"))
    if mesh.context > 1:
        crossings = [(len(piece.layers), _crossing(piece, mesh)) for piece in parts.blocks]
        for place, name in enumerate(("states", "keys")):
            sent = sum(layers * crossing[2 * place] for layers, crossing in crossings)
            messages = sum(layers * crossing[2 * place + 1] for layers, crossing in crossings)
            if messages:
                add(name, sent, messages, mesh.span("context"))
    if mesh.tensor > 1:
        sums = sum(len(piece.layers) * (1 + ("+" in piece.name)) for piece in parts.blocks)
        sums *= 3 if checkpointing else 2
        add("tensor", 2 * sums * parts.stream * (mesh.tensor - 1) / mesh.tensor, float(sums), mesh.span("tensor"))
    return found


def _crossing(piece: Piece, mesh: Mesh) -> tuple[float, float, float, float]:
    """Of a layer's mixing where sequences are cut: bytes and messages of states, and of keys."""
    crossed, ranks = piece.crossed, mesh.context
    if crossed.way == "state":  # from each to the next
        return crossed.gathered * 2, 2.0, 0.0, 0.0
    states = (crossed.gathered + crossed.exchanged / ranks) * (ranks - 1) / mesh.tensor * 2
    keys = sum(each.sent(ranks, crossed.length) for each in crossed.attending) / mesh.tensor
    goes = sum(each.messages(ranks, crossed.length) for each in crossed.attending)
    return states, float(crossed.messages * 2), keys, goes


def weights_of_one(parts: Parts, mesh: Mesh, parameters: int) -> float:
    """Numbers in the weights that a processor has before they are sharded."""
    return sum(held(parts, mesh, parameters).values())
