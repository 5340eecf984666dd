"""Masked tokens (Devlin et al. 2018, arXiv 1810.04805): what a model that looks both ways learns from text.

A share of each sequence's tokens is chosen, and the model is to tell them. Most of them are replaced by the mask's id,
some by another id, and some are left as they are, so that no token's output can rely on its input::

    loss = - 1/m Σ log p(x_t | x̃),   over the m chosen tokens t, with x̃ the sequence after the replacements
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.model import SequenceModel
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.data import Data, Text
from ssmzoo.train.vocabulary import Vocabulary


@dataclass(frozen=True)
class Masking:
    """How tokens are masked.

    Attributes:
        mask_id: the id of the mask.
        ids: the ids that replace tokens at random are below this, and never the mask's.
        rate: the share of a sequence's tokens that is chosen, at least one.
        random: the share of these that another id replaces.
        kept: the share that stays as it is; the mask replaces the others.
    """

    mask_id: int
    ids: int
    rate: float = 0.15
    random: float = 0.1
    kept: float = 0.1

    def choose(self, shape: tuple[int, int], draw: np.random.Generator) -> Tensor:
        """Bool ``(b, l)``: as many tokens of each sequence, wherever they stand."""
        b, l = shape
        count = max(1, round(self.rate * l))
        places = draw.random((b, l)).argsort(axis=1)[:, :count]
        chosen = np.zeros((b, l), dtype=bool)
        np.put_along_axis(chosen, places, True, axis=1)
        return torch.from_numpy(chosen)

    def replace(self, ids: Tensor, chosen: Tensor, draw: np.random.Generator) -> Tensor:
        """Ids ``(b, l)`` in which those that are chosen have been replaced."""
        share = torch.from_numpy(draw.random(ids.shape))
        within = self.mask_id < self.ids
        others = torch.from_numpy(draw.integers(0, self.ids - within, ids.shape))
        if within:
            others += others >= self.mask_id
        masked = torch.where(chosen & (share >= self.kept + self.random), self.mask_id, ids)
        return torch.where(chosen & (share < self.random), others, masked)


class Masked(NamedTuple):
    """What a model is given, and the tokens that it should tell."""

    inputs: Tensor  # (b l), some of them replaced
    chosen: Tensor  # (b l) bool, m of them True
    answers: Tensor  # (m) ids

    def to(self, device: torch.device) -> Masked:
        """On a device."""
        return Masked(*(t.to(device) for t in self))


class MaskedTokens:
    """Windows of a text in which tokens are masked."""

    def __init__(self, tokens: Text, masking: Masking):
        self._tokens, self._masking = tokens, masking
        self.width, self.places, self.spread = tokens.width, tokens.places, tokens.spread
        self.fingerprint = tokens.fingerprint

    def __len__(self) -> int:
        return len(self._tokens)

    def take(self, places: np.ndarray, length: int, draw: np.random.Generator) -> Masked:
        """The windows that start at some places, masked anew each time."""
        ids = self._tokens.take(places, length, draw)[:, :length]
        chosen = self._masking.choose((len(ids), length), draw)
        return Masked(self._masking.replace(ids, chosen, draw), chosen, ids[chosen])


class MaskedData(NamedTuple):
    """What a model of masked tokens trains on and what it is judged by."""

    train: MaskedTokens
    validation: MaskedTokens
    text: Data
    masking: Masking

    @property
    def unit(self) -> str:
        """What losses are counted by."""
        return "masked_token"

    def bits(self, nats: float) -> float:
        """A loss in nats a masked token → in bits."""
        return nats / math.log(2)


def masking_of(config: TrainConfig, vocabulary: Vocabulary | None, vocab_size: int) -> Masking:
    """As the settings of a run say, for a vocabulary (None for ids without text).

    The mask is ``mask_id``, or else the vocabulary's own, or else the id after all others.

    Raises:
        ValueError: it is no id of the model's.
    """
    ids = vocab_size if vocabulary is None else vocabulary.size
    own = vocabulary.mask_id if vocabulary is not None else vocab_size - 1
    mask_id = next(found for found in (config.mask_id, own, ids) if found is not None)
    if mask_id >= vocab_size:
        raise ValueError(
            f"train: `mask_id` must be below the model's vocab_size, {vocab_size}; got {mask_id}: add "
            f"--set vocab_size={mask_id + 1}"
        )
    return Masking(mask_id, ids, config.mask_rate, config.mask_random, config.mask_kept)


def masked_data(text: Data, masking: Masking) -> MaskedData:
    """A text for learning masked tokens."""
    return MaskedData(MaskedTokens(text.train, masking), MaskedTokens(text.validation, masking), text, masking)


@torch.no_grad()
def pseudo_perplexity(
    model: SequenceModel, ids: Tensor | Sequence[int], mask_id: int, *, batch_size: int = 64
) -> float:
    """exp(- 1/l Σ_t log p(x_t | x without t)), each token masked in turn (Salazar et al. 2020, arXiv 1910.14659).

    It takes one pass of the model for each token.

    Args:
        model: from tokens to tokens, which looks both ways. It runs in evaluation mode and is put back.
        ids: a sequence ``(l)``, int64, at least one token.
        mask_id: the id of the mask.
        batch_size: copies of the sequence, each with another token masked, in one pass.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
    """
    if not isinstance(model, SequenceModel) or model.config.output != "tokens" or model.config.d_input is not None:
        raise TypeError(f"pseudo_perplexity: `model` must be a SequenceModel of tokens; got {type(model).__name__}")
    vocab = model.config.padded_vocab_size
    row = torch.as_tensor(ids)
    if row.ndim != 1 or not len(row) or row.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"pseudo_perplexity: `ids` must be ints (l), at least one; got {row.dtype} {tuple(row.shape)}")
    if not 0 <= mask_id < vocab:
        raise ValueError(f"pseudo_perplexity: `mask_id` must be from 0 to {vocab - 1}; got {mask_id}")
    if batch_size < 1:
        raise ValueError(f"pseudo_perplexity: `batch_size` must be at least 1; got {batch_size}")
    row, training, nats = row.to(model.device, torch.int64), model.training, 0.0
    model.eval()
    try:
        for places in torch.arange(len(row), device=row.device).split(batch_size):
            inputs, copy = row.repeat(len(places), 1), torch.arange(len(places), device=row.device)
            inputs[copy, places] = mask_id
            logits = model(inputs)[copy, places].float()
            nats += float(F.cross_entropy(logits, row[places], reduction="sum"))
    finally:
        model.train(training)
    return math.exp(nats / len(row))
