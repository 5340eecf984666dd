"""From logits to a token: bias, penalties, temperature, filters and a draw."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ssmzoo.generate.arguments import is_int, is_number, require
from ssmzoo.generate.penalties import History, discourage, penalise

STRETCH = 512  # scores of which the highest is found at once


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options of sampling, checked; :func:`ssmzoo.generate.generate` says what each of them means.

    Errors name ``caller`` as what was called.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    caller: dataclasses.InitVar[str] = "generate"

    def __post_init__(self, caller: str) -> None:
        temperature, penalty, top_p, min_p = self.temperature, self.repetition_penalty, self.top_p, self.min_p
        for name, fits, expected in (
            ("temperature", is_number(temperature) and temperature >= 0, "a number of at least 0"),
            ("top_k", self.top_k is None or is_int(self.top_k, 1), "an int of at least 1, or None"),
            ("top_p", top_p is None or (is_number(top_p) and 0 < top_p <= 1), "above 0 and at most 1, or None"),
            ("min_p", min_p is None or (is_number(min_p) and 0 <= min_p <= 1), "from 0 to 1, or None"),
            ("repetition_penalty", is_number(penalty) and 1e-6 <= penalty <= 1e6, "a number from 1e-6 to 1e6"),
            ("presence_penalty", _within(self.presence_penalty, 2), "a number from -2 to 2"),
            ("frequency_penalty", _within(self.frequency_penalty, 2), "a number from -2 to 2"),
            ("logit_bias", _biases(self.logit_bias), "a dict of ids with a number from -100 to 100 each, or None"),
            ("seed", self.seed is None or is_int(self.seed, 0, 2**63), "an int from 0 to 2**63, or None"),
        ):
            require(fits, name, getattr(self, name), expected, caller)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or ()) or None)  # the caller may change its own

    @property
    def given(self) -> list[str]:
        """Names of the options that differ from their defaults; a temperature of 0 draws nothing and does not count."""
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return [name for name in changed if name != "temperature" or self.temperature != 0]

    def check_ids(self, vocab: int, caller: str = "generate") -> None:
        """Refuses a bias of ids outside the vocabulary."""
        for id in self.logit_bias or ():
            require(id < vocab, "logit_bias", id, f"of ids from 0 to {vocab - 1}, the vocabulary", caller)

    @functools.cached_property
    def key(self) -> tuple:
        """Equal where tokens of two requests, each with its own random numbers, may be drawn together."""
        biases = tuple(sorted((self.logit_bias or {}).items()))
        options = dataclasses.astuple(dataclasses.replace(self, logit_bias=None, seed=None))
        return (*options, biases)

    @property
    def operations(self) -> int:
        """About how many simple operations :meth:`pick` takes for each score."""
        sorts = self.top_k is not None or (self.top_p is not None and self.top_p < 1)
        return 64 if sorts else 1 if self.temperature == 0 else 16

    def history(self, prompts: Tensor, mask: Tensor | None, vocab: int) -> History | None:
        """What the penalties have to know of prompts (b l); None without penalties."""
        seen, counts = self.repetition_penalty != 1, self.presence_penalty != 0 or self.frequency_penalty != 0
        return History.of(prompts, mask, vocab, seen=seen, counts=counts) if seen or counts else None

    def pick(self, scores: Tensor, history: History | None, draws: Iterator[Tensor] | None) -> Tensor:
        """The next ids (b) from scores (b v); ``draws`` is None where the most likely id is taken."""
        if draws is None:
            return most_likely(self._changed(scores, history))
        return sample(self._filtered(scores, history), next(draws))

    def probabilities(self, scores: Tensor, history: History | None) -> Tensor:
        """What ids are drawn by, (b v), at a temperature above 0."""
        return self._filtered(scores, history).softmax(-1, dtype=precise(scores.device))

    def draw(self, scores: Tensor, history: History | None, draws: Iterator[Tensor]) -> tuple[int, Tensor | None]:
        """An id from scores (1 v), with the probabilities (v) that it was drawn by; None at temperature 0."""
        if self.temperature == 0:
            return int(self.pick(scores, history, None)), None
        probabilities = self.probabilities(scores, history)
        return int(sample(probabilities.log(), next(draws).to(scores.device))), probabilities[0]

    def _filtered(self, scores: Tensor, history: History | None) -> Tensor:
        warm = warmed(self._changed(scores, history), self.temperature)
        return filtered(warm, self.top_k, self.top_p, self.min_p)

    def _changed(self, scores: Tensor, history: History | None) -> Tensor:
        """With the bias, and then the penalties."""
        if self.logit_bias:
            ids, values = (each.to(scores.device) for each in self._bias)
            scores = scores.index_add(1, ids, values.to(scores.dtype).expand(len(scores), -1))
        if history is not None and history.seen is not None:
            scores = penalise(scores, history.seen, self.repetition_penalty)
        if history is not None and history.counts is not None:
            scores = discourage(scores, history.counts, self.presence_penalty, self.frequency_penalty)
        return scores

    @functools.cached_property
    def _bias(self) -> tuple[Tensor, Tensor]:
        """Ids and what is added to their logits."""
        biases = self.logit_bias or {}
        return torch.tensor(list(biases)), torch.tensor(list(biases.values()), dtype=torch.float64)


def _within(value: object, most: float) -> bool:
    return is_number(value) and -most <= value <= most  # type: ignore[operator]


def _biases(value: object) -> bool:
    return value is None or (
        isinstance(value, Mapping) and all(is_int(id, 0) and _within(bias, 100) for id, bias in value.items())
    )


def warmed(scores: Tensor, temperature: float) -> Tensor:
    """Scores (b v) divided by a temperature, the highest at 0 so that a small one overflows nowhere."""
    if temperature >= 1e-3:
        return scores / temperature
    return (scores - scores.amax(-1, keepdim=True)) / max(temperature, 1e-30)


def filtered(scores: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """Scores (b v) with -inf where a token is out; the most likely one always stays."""
    if top_k is not None and top_k < scores.shape[-1]:
        threshold = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if top_p is not None and top_p < 1:
        ascending, order = scores.sort(dim=-1)
        out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(1, order, out), -torch.inf)
    if min_p is not None and min_p > 0:
        probabilities = scores.softmax(-1)
        out = probabilities < min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(out, -torch.inf)
    return scores


def most_likely(scores: Tensor) -> Tensor:
    """The first id of the highest score of each row: (b v) → (b).

    On a CPU PyTorch's ``argmax`` looks at one number after another, and its ``amax`` at a vector of them. So the
    highest of each stretch is found first, and an id only within the first stretch that has the highest of all.
    """
    count = scores.shape[-1]
    whole = count // STRETCH
    if scores.device.type != "cpu" or whole < 2:
        return scores.argmax(-1)
    stretches = scores[:, : whole * STRETCH].unflatten(1, (whole, STRETCH)).amax(-1)
    highest = torch.cat([stretches, scores[:, -STRETCH:].amax(-1, keepdim=True)], 1)  # the last may overlap
    start = (highest.argmax(-1, keepdim=True) * STRETCH).clamp(max=count - STRETCH)
    within = scores.take_along_dim(start + torch.arange(STRETCH), 1)
    return start[:, 0] + within.argmax(-1)


def sample(scores: Tensor, draw: Tensor) -> Tensor:
    """Scores (b v) and numbers uniform in [0, 1) (b) → ids (b), by the inverse of the distribution."""
    probabilities = scores.softmax(-1, dtype=draw.dtype)
    cumulative = probabilities.cumsum(-1)
    reach = draw[:, None] * cumulative[:, -1:]
    if scores.device.type == "cpu":  # where sums never fall along a row
        first = torch.searchsorted(cumulative, reach, right=True)[:, 0]
        if bool((first < scores.shape[-1]).all()):
            return first
    # A parallel sum may waver where it should be flat: hence both conditions.
    reached = (cumulative > reach) & (probabilities > 0)
    return torch.where(reached.any(-1), reached.int().argmax(-1), probabilities.argmax(-1))


def precise(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def draws_of(b: int, n: int, seed: int | None, device: torch.device) -> Iterator[Tensor]:
    """n times (b) numbers uniform in [0, 1): a generator for each row, on the CPU, so that devices agree."""
    if seed is None:
        seed = int(torch.randint(2**32, (), device="cpu"))
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(b)]
    for start in range(0, n, 256):
        size = min(256, n - start)
        rows = [torch.rand(size, generator=g, dtype=torch.float64, device="cpu") for g in generators]
        yield from torch.stack(rows).to(device, precise(device)).unbind(1)
