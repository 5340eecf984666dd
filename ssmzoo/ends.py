"""What a model has before its first layer and after its last."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmkernels.core.crossing import in_whole, whole_lengths
from ssmzoo.cache.tokens import owners
from ssmzoo.config import ModelConfig
from ssmzoo.linear import Linear
from ssmzoo.mlp.base import ACTIVATIONS
from ssmzoo.norm import NORMS
from ssmzoo.state import State

START = 0.02  # standard deviation of the tables at the start


@dataclasses.dataclass
class PositionState(State):
    """How many tokens each sequence has had.

    Attributes:
        lengths: int64 ``(s)``.
        longest: no sequence has had more; too high where the longest were dropped.
    """

    lengths: Tensor
    longest: int = 0

    def _concatenated_field(self, name: str, values: list[Any]) -> Any:
        return max(values) if name == "longest" else super()._concatenated_field(name, values)


class LearnedPositions(nn.Embedding):
    """A vector for each position, learned, as in GPT-2 and BERT (Devlin et al. 2018, arXiv 1810.04805).

    Args:
        rows: positions that there are.
        d_model: width of the vectors.
    """

    def __init__(self, rows: int, d_model: int):
        super().__init__(rows, d_model)
        nn.init.normal_(self.weight, std=START)

    def initial_state(self, batch_size: int) -> PositionState:
        """Before the first token."""
        return PositionState(torch.zeros(batch_size, dtype=torch.int64, device=self.weight.device))

    def forward(  # type: ignore[override]
        self, x: Tensor, state: PositionState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, PositionState | None]:
        """The vectors of the tokens' positions, ``(b or 1, l, d_model)``, and the state after the tokens.

        Args:
            x: the tokens, ``(b, l, …)``.
            state: the tokens that the sequences have had; None for none.
            cu_seqlens: int32 ``(s + 1)``, borders of packed sequences.

        Raises:
            ValueError: a sequence has more tokens than there are positions.
        """
        before = None if state is None else state.lengths
        if cu_seqlens is None:
            step, counts = torch.arange(x.shape[1], device=x.device), None
            place = step[None] if before is None else before[:, None] + step
            most = x.shape[1]
        else:
            counts = whole_lengths(cu_seqlens).long()
            row, step = owners(cu_seqlens, x.shape[1])
            step = in_whole(row, step)
            place = (step if before is None else before[row] + step)[None]
            most = int(counts.max()) if len(counts) else 0
        after = None
        if state is not None:
            after = PositionState(state.lengths + (most if counts is None else counts), state.longest + most)
            if after.longest > self.num_embeddings:
                after.longest = int(after.lengths.max())
            most = after.longest
        if most > self.num_embeddings:
            raise ValueError(
                f"SequenceModel: `inputs` must end at most at token {self.num_embeddings} of a sequence, as the model "
                f"has `learned_positions`={self.num_embeddings}; they end at token {most}"
            )
        return super().forward(place), after


class HeadTransform(nn.Module):
    """norm(f(W x + b)), before a head's own map: BERT's head of masked tokens, and, without the norm, its pooler.

    Args:
        d_model: width of input and output.
        activation: f, by its name in :data:`ssmzoo.mlp.base.ACTIVATIONS`.
        norm: the norm; None for none.
    """

    def __init__(self, d_model: int, activation: str, norm: nn.Module | None):
        super().__init__()
        self.linear = Linear(d_model, d_model)
        nn.init.zeros_(self.linear.bias)
        self.f, self.norm = ACTIVATIONS[activation], norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(self.linear(x))
        return x if self.norm is None else self.norm(x)


class Inputs(NamedTuple):
    """What makes the residual stream out of ids or features."""

    embedding: nn.Module
    position_embedding: LearnedPositions | None
    token_type_embedding: nn.Embedding | None
    embedding_norm: nn.Module | None


class Outputs(NamedTuple):
    """What makes the outputs out of the residual stream."""

    norm_f: nn.Module
    head_transform: HeadTransform | None
    lm_head: Linear


def input_modules(config: ModelConfig) -> Inputs:
    """Those that a config asks for, before the first layer."""
    d_model = config.d_model
    embedding = (
        nn.Embedding(config.padded_vocab_size, d_model) if config.d_input is None else Linear(config.d_input, d_model)
    )
    positions = types = None
    if config.learned_positions is not None:
        positions = LearnedPositions(config.learned_positions, d_model)
    if config.token_types:
        types = nn.Embedding(config.token_types, d_model)
        nn.init.normal_(types.weight, std=START)
    norm = NORMS[config.norm](d_model, eps=config.norm_eps) if config.embedding_norm else None
    return Inputs(embedding, positions, types, norm)


def output_modules(config: ModelConfig) -> Outputs:
    """Those that a config asks for, after the last layer."""

    def norm() -> nn.Module:
        return NORMS[config.norm](config.d_model, eps=config.norm_eps)

    width = {"tokens": config.padded_vocab_size, "classes": config.n_classes, "features": config.d_output}
    head = Linear(
        config.d_model, width[config.output or "tokens"] or 0, bias=config.output != "tokens" or config.head_bias
    )
    if config.output == "tokens" and config.head_bias:
        nn.init.zeros_(head.bias)
    ends_normed = config.norm_placement_of_layer(config.n_layers - 1) == "sum"
    transform = None
    if config.head_activation is not None:
        transform = HeadTransform(config.d_model, config.head_activation, norm() if config.head_norm else None)
    return Outputs(nn.Identity() if ends_normed else norm(), transform, head)


def check_token_types(token_types: Tensor | None, inputs: Tensor, types: int) -> None:
    """Raises TypeError or ValueError unless ``token_types`` fit the inputs and a model with so many types."""
    name = "SequenceModel"
    if token_types is None:
        return
    if not types:
        raise ValueError(f"{name}: `token_types` must be None, as the model's config has no `token_types`")
    if not isinstance(token_types, Tensor) or token_types.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: `token_types` must be a tensor of int64 or int32; got {token_types!r:.80}")
    if token_types.shape != inputs.shape[:2] or token_types.device != inputs.device:
        raise ValueError(
            f"{name}: `token_types` must have shape {tuple(inputs.shape[:2])} on {inputs.device}, as `inputs`; "
            f"got {tuple(token_types.shape)} on {token_types.device}"
        )
    if token_types.device.type == "cpu" and token_types.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in token_types.aminmax())
        if low < 0 or high >= types:
            raise ValueError(f"{name}: `token_types` must be from 0 to {types - 1}; got {low} to {high}")
