"""A model in pieces that are counted once: a layer of each kind, and what stands before and after the layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmkernels.core.on_paper import on_paper
from ssmzoo.block import Block
from ssmzoo.config import ModelConfig
from ssmzoo.model import SequenceModel
from ssmzoo.planning.counting import Counts, Gauge, note_loss, without_values
from ssmzoo.planning.crossed import Crossed, crossed
from ssmzoo.value_residual import ValueResidualMixer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Piece:
    """Layers that are alike, or the ends of the model.

    Attributes:
        name: the mixer and the MLP; "ends" for embedding, head and loss.
        layers: their places in the model; none for the ends.
        counts: of one such layer, with its norms and sums.
        mixer: of its mixer alone.
        split: of its mixer and MLP, which tensor parallelism divides.
        parameters: numbers in its weights.
        weights: how many tensors these are.
        split_parameters: those of its mixer and MLP.
        crossed: what its mixing exchanges where sequences are cut.
        state: bytes of its state after the last token.
    """

    name: str
    layers: tuple[int, ...]
    counts: Counts
    mixer: Counts
    split: Counts
    parameters: int
    weights: int
    split_parameters: int
    crossed: Crossed
    state: int


@dataclasses.dataclass(frozen=True)
class Parts:
    """All pieces at one batch and length.

    Attributes:
        blocks: layers by kind.
        ends: embedding, head and loss.
        stream: bytes of the residual stream between two layers.
    """

    blocks: tuple[Piece, ...]
    ends: Piece
    stream: float


def parts_of(
    config: ModelConfig, batch: int, length: int, precision: str, kind: str, gauge: Gauge | None = None
) -> Parts:
    """Counts the pieces of a training step on tensors without memory.

    Args:
        batch, length: sequences and their tokens.
        precision: "fp32", or "bf16" for activations beside float32 weights.
        kind: of device, whose kernels run: "cpu" or "cuda".
        gauge: that has counted the same model before.

    Raises:
        ValueError: a sequence that the model cannot take.
    """
    dtype, gauge = DTYPES[precision], gauge or Gauge()
    with without_values(), on_paper(kind):
        first = Block(config, 0).to(dtype)
        kinds: dict[tuple[str, Any, Any, str], list[int]] = {}
        for i in range(config.n_layers):
            mlp = config.mlp_pattern[i % len(config.mlp_pattern)] if config.mlp_pattern else ""
            key = (config.entry_of_layer(i), mlp, config.feed_of_layer(i), config.norm_placement_of_layer(i))
            kinds.setdefault(key, []).append(i)
        blocks = tuple(
            _layer(config, Block(config, layers[0]).to(dtype), layers, first, batch, length, gauge)
            for layers in kinds.values()
        )
        ends = _ends(config, dtype, batch, length, gauge)
    return Parts(blocks, ends, float(batch * length * config.d_model * dtype.itemsize))


def _layer(
    config: ModelConfig, block: Block, layers: list[int], first: Block, batch: int, length: int, gauge: Gauge
) -> Piece:
    dtype = block.mixer.like().dtype

    def stream(l: int) -> Tensor:
        return torch.empty(batch, l, config.d_model, dtype=dtype, requires_grad=True)

    def whole(l: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        x = stream(l)
        embedded = stream(l) if block.feed is not None else None
        values: list[Tensor] = []
        if isinstance(block.mixer, ValueResidualMixer) and layers[0] > 0:
            with torch.no_grad():
                first(x, None, None, embedded, values)
        given = [x, *values, *([] if embedded is None else [embedded]), *_tensors(block)]
        return (lambda: block(x, None, None, embedded, values)[0]), given

    def inner(module: nn.Module, call: Callable[[Tensor], Tensor]) -> Counts:
        def make(l: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
            x = stream(l)
            return (lambda: call(x)), [x, *_tensors(module)]

        return gauge.counted(f"{layers[0]} {type(module).__name__}", make, length)

    alone = not isinstance(block.mixer, ValueResidualMixer)
    mixer = split = inner(block.mixer, block.mixer) if alone else Counts()
    if block.mlp is not None:
        split = split.combined(inner(block.mlp, block.mlp), 1, 1)
    kind = config.mixer_options(config.entry_of_layer(layers[0]))["kind"]
    mlp = "" if block.mlp is None else f" + {config.mlp_of_layer(layers[0])['kind']}"
    split_parameters = _numbers(block.mixer) + (0 if block.mlp is None else _numbers(block.mlp))
    state = block.initial_state(batch, length).nbytes if block.mixer.causal and block.mixer.has_state else 0
    return Piece(
        kind + mlp,
        tuple(layers),
        gauge.counted(f"{layers[0]}", whole, length),
        mixer,
        split,
        _numbers(block),
        len(list(block.parameters())),
        split_parameters,
        crossed(block.mixer, batch, length),
        state,
    )


def _ends(config: ModelConfig, dtype: torch.dtype, batch: int, length: int, gauge: Gauge) -> Piece:
    """What a model of one layer does beyond that layer."""
    one = config.override({"n_layers": 1, "pattern": [config.entry_of_layer(0)]})
    model = SequenceModel(one).to(dtype)
    block = model.blocks[0]

    def note(_: nn.Module, given: Any, out: Any) -> None:
        if out[0].requires_grad:
            out[0].register_hook(note_loss)

    block.register_forward_hook(note)

    def whole(l: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        inputs, targets = batch_of(config, batch, l, dtype)
        return (lambda: loss_of(model(inputs), targets)), [inputs, targets, *_tensors(model)]

    def layer(l: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        x, embedded = (torch.empty(batch, l, config.d_model, dtype=dtype, requires_grad=True) for _ in range(2))
        return (lambda: block(x, None, None, embedded, [])[0]), [x, embedded, *_tensors(block)]

    together, inside = gauge.counted("model", whole, length), gauge.counted("0", layer, length)
    counts = together.combined(inside, 1, -1)
    beyond = dataclasses.replace(
        counts,
        work={item: number for item, number in counts.work.items() if number},
        forward_peak=together.forward_peak - inside.kept,
        backward_peak=together.loss_peak - inside.kept,
    )
    numbers, weights = (count(model) - count(block) for count in (_numbers, lambda m: len(list(m.parameters()))))
    return Piece("ends", (), beyond, Counts(), Counts(), numbers, weights, 0, Crossed(), 0)


def batch_of(config: ModelConfig, batch: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a model is trained on: inputs, and the ids, classes or features that it should tell; all zero."""
    tokens = config.d_input is None
    inputs = (
        torch.zeros(batch, length, dtype=torch.int64)
        if tokens
        else torch.zeros(batch, length, config.d_input or 0, dtype=dtype)
    )
    if config.output == "features":
        return inputs, torch.zeros(batch, length, config.d_output or 0, dtype=torch.float32)
    answers = (batch,) if config.output == "classes" else (batch, length)
    return inputs, torch.zeros(*answers, dtype=torch.int64)


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss, as `ssmzoo train` takes it."""
    if targets.is_floating_point():
        return F.mse_loss(outputs.float(), targets)
    return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
