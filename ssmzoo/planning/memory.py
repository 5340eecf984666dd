"""The memory of one processor in a training step, by what takes it.

Weights, gradients and AdamW's two moments are float32: 16 bytes a parameter (ZeRO, arXiv 1910.02054, section 3.1, where
mixed precision adds a copy of the weights in half precision). Sharding cuts all three; before a layer runs, its weights
are gathered, and the next layer's while it runs (FSDP, arXiv 2304.11277, section 3.3). Activations are what the layers
keep for the backward pass, as counted. With checkpointing each layer keeps its input alone, and one layer at a time has
all (arXiv 1604.06174).
"""

from __future__ import annotations

import dataclasses

from ssmzoo.planning.mesh import Mesh
from ssmzoo.planning.pieces import Parts, Piece

WIDE, MOMENTS = 4, 8  # bytes of a weight, and of AdamW's moments for it
HALF = {"fp32": 0, "bf16": 2}  # bytes of a weight's copy beside it


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one processor at the worst moment of a step.

    Attributes:
        weights, gradients, optimizer: of this processor's share.
        copies: of weights in half precision, and those gathered for a layer.
        buffers: for communication: gradients on their way, keys and values of other parts.
        activations: what layers keep for the backward pass, by kind of layer.
        transient: beyond all that, at the worst moment.
        worst: which moment that is.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    buffers: float
    activations: dict[str, float]
    transient: float
    worst: str

    @property
    def total(self) -> float:
        """The most that is in use at once."""
        fixed = self.weights + self.gradients + self.optimizer + self.copies + self.buffers
        return fixed + sum(self.activations.values()) + self.transient


def memory(parts: Parts, mesh: Mesh, precision: str, checkpointing: bool, parameters: int) -> Memory:
    """The memory of one processor.

    Args:
        parts: counted for its share of sequences and tokens.
        mesh: of the processors.
        precision: "fp32" or "bf16".
        checkpointing: of every layer.
        parameters: of the model, where those that several layers share count once.
    """
    layers = {i: piece for piece in parts.blocks for i in piece.layers}
    order = [layers[i] for i in sorted(layers)]
    weights = held(parts, mesh, parameters)
    own = sum(weights.values()) / mesh.shard
    one = {id(piece): weights[piece.name, piece.layers] / max(len(piece.layers), 1) for piece in parts.blocks}
    largest = max(one.values())
    kept = {id(piece): _kept(piece, mesh, parts.stream, checkpointing) for piece in parts.blocks}
    head, ends = parts.ends.counts, weights[parts.ends.name, ()]

    copies, buffers = own * HALF[precision] * (mesh.shard == 1), 0.0
    gathered = arriving = leaving = 0.0  # while layers run: weights of one and the next, as they come, and gradients
    if mesh.shard > 1:
        size = HALF[precision] or WIDE
        copies = ends * size  # which stay
        gathered, arriving, leaving = 2 * largest * size, largest * size, largest * WIDE
    elif mesh.data > 1:
        buffers = own * WIDE  # DDP's buckets
    if mesh.context > 1:
        buffers += 2 * mesh.context * max(piece.crossed.gathered for piece in parts.blocks) / mesh.tensor

    activations: dict[str, float] = {}
    for piece in parts.blocks:
        activations[piece.name] = activations.get(piece.name, 0.0) + len(piece.layers) * kept[id(piece)]
    activations["ends"] = head.kept
    alive = sum(activations.values())
    moments = {  # activations, what is beyond them, gradients, weights of layers, and what travels
        "forward pass": (alive, max(head.forward_peak - head.kept, 0), 0.0, gathered, arriving),
        "loss": (alive, max(head.backward_peak - head.kept, 0), 0.0, 0.0, 0.0),
        "optimizer": (0.0, 0.0, own * WIDE, 0.0, 0.0),
    }
    gradients = ends * WIDE / mesh.shard
    for place in range(len(order) - 1, -1, -1):
        piece = order[place]
        alive = sum(kept[id(p)] for p in order[: place + 1])
        more = _whole(piece, mesh, "backward_peak") - _whole(piece, mesh, "kept") + _moving(piece, mesh)
        if mesh.shard > 1:
            more -= one[id(piece)] * WIDE * (1 - 1 / mesh.shard)  # counted as a buffer
        if checkpointing:
            more += _whole(piece, mesh, "kept") - kept[id(piece)]
        moment = (alive, more, gradients, gathered, arriving + leaving)
        before = moments.setdefault(f"backward pass of {piece.name}", moment)
        if sum(before) < sum(moment):
            moments[f"backward pass of {piece.name}"] = moment
        gradients += one[id(piece)] * WIDE / mesh.shard
    worst = max(moments, key=lambda name: sum(moments[name]))
    alive, transient, gradients, gathered, travelling = moments[worst]
    share = alive / max(sum(activations.values()), 1.0)
    return Memory(
        own * WIDE,
        gradients,
        own * MOMENTS,
        copies + gathered,
        buffers + travelling,
        {name: size * share for name, size in activations.items()},
        transient,
        worst,
    )


def held(parts: Parts, mesh: Mesh, parameters: int) -> dict[tuple[str, tuple[int, ...]], float]:
    """Numbers in the weights of all layers of a kind on one processor, before they are sharded, by name and layers.

    Args:
        parameters: of the model; fewer than those of all layers where some share weights.
    """
    pieces = (*parts.blocks, parts.ends)
    whole = {(p.name, p.layers): max(len(p.layers), 1) * p.parameters for p in pieces}
    shared = parameters / sum(whole.values())
    return {
        (p.name, p.layers): shared
        * (whole[p.name, p.layers] - len(p.layers) * p.split_parameters * (1 - 1 / mesh.tensor))
        for p in pieces
    }


def _whole(piece: Piece, mesh: Mesh, what: str) -> float:
    """Bytes of a layer, of which tensor parallelism divides its mixer's and MLP's."""
    return getattr(piece.counts, what) - getattr(piece.split, what) * (1 - 1 / mesh.tensor)


def _kept(piece: Piece, mesh: Mesh, stream: float, checkpointing: bool) -> float:
    """Bytes that a layer keeps for its backward pass."""
    own, cut, crossed = stream if checkpointing else _whole(piece, mesh, "kept"), 0.0, piece.crossed
    if mesh.context > 1:
        for each in crossed.attending:
            cut += (each.taped if checkpointing else each.kept)(mesh.context, crossed.length)
    return own + cut / mesh.tensor


def _moving(piece: Piece, mesh: Mesh) -> float:
    """Bytes of what travels between parts of a sequence while one layer runs."""
    crossed = piece.crossed
    if mesh.context == 1:
        return 0.0
    return max((each.moving(mesh.context, crossed.length) for each in crossed.attending), default=0.0) / mesh.tensor
