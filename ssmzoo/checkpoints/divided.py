"""Weights that are divided over the processes of tensor parallelism: which rows or columns each of them holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How a weight is divided along a dimension.

    Its sections follow one another, ``(size, divided)``. Of a divided one each process has an equal part, in the order
    of the processes; each has the whole of any other.
    """

    dim: int
    sections: tuple[tuple[int, bool], ...]

    def check(self, name: str, ranks: int) -> None:
        """Each divided section has as much for every process.

        Raises:
            ValueError: naming the weight.
        """
        for size, divided in self.sections:
            if divided and size % ranks:
                raise ValueError(
                    f"`parallel.tensor` must divide the {size} rows or columns of {name} shared out; got {ranks}"
                )

    def piece(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """What one of so many processes holds."""
        sections = whole.split([size for size, _ in self.sections], dim=self.dim)
        return torch.cat(
            [
                part.chunk(ranks, dim=self.dim)[rank] if divided else part
                for part, (_, divided) in zip(sections, self.sections, strict=True)
            ],
            dim=self.dim,
        )

    def whole(self, pieces: Sequence[Tensor]) -> Tensor:
        """The weight, of what each process holds."""
        ranks = len(pieces)
        sizes = [size // ranks if divided else size for size, divided in self.sections]
        split = [piece.split(sizes, dim=self.dim) for piece in pieces]
        found: list[Tensor] = []
        for i, (_, divided) in enumerate(self.sections):
            found += [parts[i] for parts in split] if divided else [split[0][i]]
        return torch.cat(found, dim=self.dim)

    def common(self, ranks: int) -> list[slice]:
        """Where in a piece the sections are that every process has."""
        found, start = [], 0
        for size, divided in self.sections:
            here = size // ranks if divided else size
            if not divided:
                found.append(slice(start, start + here))
            start += here
        return found
