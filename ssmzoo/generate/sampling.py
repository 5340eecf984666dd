"""From logits to a token: penalty, temperature, filters and a draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmzoo.generate.arguments import is_int, is_number, require


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options of sampling, checked; :func:`ssmzoo.generate.generate` says what each of them means."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature, penalty, top_p, min_p = self.temperature, self.repetition_penalty, self.top_p, self.min_p
        for name, fits, expected in (
            ("temperature", is_number(temperature) and temperature >= 0, "a number of at least 0"),
            ("top_k", self.top_k is None or is_int(self.top_k, 1), "an int of at least 1, or None"),
            ("top_p", top_p is None or (is_number(top_p) and 0 < top_p <= 1), "above 0 and at most 1, or None"),
            ("min_p", min_p is None or (is_number(min_p) and 0 <= min_p <= 1), "from 0 to 1, or None"),
            ("repetition_penalty", is_number(penalty) and penalty > 0, "above 0"),
            ("seed", self.seed is None or is_int(self.seed, 0, 2**63), "an int from 0 to 2**63, or None"),
        ):
            require(fits, name, getattr(self, name), expected)

    @property
    def given(self) -> list[str]:
        """Names of the options that differ from their defaults; a temperature of 0 draws nothing and does not count."""
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return [name for name in changed if name != "temperature" or self.temperature != 0]

    def pick(self, scores: Tensor, seen: Tensor | None, draws: Iterator[Tensor] | None) -> Tensor:
        """The next ids (b) from scores (b v); ``draws`` is None where the most likely id is taken."""
        if seen is not None:
            scores = penalise(scores, seen, self.repetition_penalty)
        if draws is None:
            return scores.argmax(-1)
        return sample(filtered(warmed(scores, self.temperature), self.top_k, self.top_p, self.min_p), next(draws))


def warmed(scores: Tensor, temperature: float) -> Tensor:
    """Scores (b v) divided by a temperature, the highest at 0 so that a small one overflows nowhere."""
    if temperature >= 1e-3:
        return scores / temperature
    return (scores - scores.amax(-1, keepdim=True)) / max(temperature, 1e-30)


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes seen ids less likely (CTRL, arXiv 1909.05858). scores (b v), seen (b v) bool → (b v)."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


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


def sample(scores: Tensor, draw: Tensor) -> Tensor:
    """Scores (b v) and numbers uniform in [0, 1) (b) → ids (b), by the inverse of the distribution."""
    probabilities = scores.softmax(-1, dtype=draw.dtype)
    cumulative = probabilities.cumsum(-1)
    # A parallel sum may waver where it should be flat: hence both conditions.
    reached = (cumulative > draw[:, None] * cumulative[:, -1:]) & (probabilities > 0)
    return torch.where(reached.any(-1), reached.int().argmax(-1), probabilities.argmax(-1))


def draws_of(b: int, n: int, seed: int | None, device: torch.device) -> Iterator[Tensor]:
    """n times (b) numbers uniform in [0, 1): a generator for each row, on the CPU, so that devices agree."""
    if seed is None:
        seed = int(torch.randint(2**32, (), device="cpu"))
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(b)]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    for start in range(0, n, 256):
        size = min(256, n - start)
        rows = [torch.rand(size, generator=g, dtype=torch.float64, device="cpu") for g in generators]
        yield from torch.stack(rows).to(device, dtype).unbind(1)


def seen_in(prompts: Tensor, mask: Tensor | None, vocab: int) -> Tensor:
    """(b vocab): the ids that stand in each prompt."""
    seen = torch.zeros(len(prompts), vocab + 1, dtype=torch.bool, device=prompts.device)
    seen.scatter_(1, prompts if mask is None else prompts.masked_fill(~mask, vocab), True)
    return seen[:, :vocab].contiguous()
