"""Names of weights in a published checkpoint, turned into ours by rules, and back by the same rules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.checkpoints.spelling import Spelling, spelling
from ssmzoo.checkpoints.weights import some


@dataclasses.dataclass(frozen=True)
class Parts:
    """One published tensor that is several of ours, or one of another shape.

    Attributes:
        names: ours, in which groups are written as in :func:`re.sub`.
        cut: the published tensor → ours, in that order.
        join: ours → the published one.
    """

    names: Sequence[str]
    cut: Callable[[Tensor], Sequence[Tensor]]
    join: Callable[[list[Tensor]], Tensor]


Rule = tuple[str, "str | Parts"]


def renamed(weights: dict[str, Tensor], rules: Sequence[Rule], what: str) -> dict[str, Tensor]:
    """Weights by our names; they are taken out of ``weights``, so that of joined ones one at a time is there twice.

    A rule is a regular expression for a whole name, and what it becomes, where groups are written as in
    :func:`re.sub`. The first rule that matches counts. What it becomes may be

    - a name;
    - a name with a place in brackets: tensors of one name are put one after another along their rows, ``name[0]``,
      ``name[1]``; or stacked first and put one after another then, ``name[3,0]``;
    - :class:`Parts`: the tensor is cut into several, or becomes one of another shape;
    - "": it is left out.

    Args:
        weights: by their published names; empty afterwards.
        rules: see above.
        what: the kind of model, for errors.

    Raises:
        ValueError: names that no rule knows, or a part of a tensor that is missing.
    """
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[tuple[int, ...], Tensor]] = {}
    strange = []
    for key in list(weights):
        tensor = weights.pop(key)
        for pattern, becomes in rules:
            match = re.fullmatch(pattern, key)
            if match is None:
                continue
            if isinstance(becomes, Parts):
                names = [match.expand(name) for name in becomes.names]
                found |= dict(zip(names, becomes.cut(tensor), strict=True))
            elif becomes:
                name = match.expand(becomes)
                place = PLACE.fullmatch(name)
                if place is None:
                    found[name] = tensor
                else:
                    indices = tuple(int(i) for i in place[2].split(","))
                    parts.setdefault(place[1], {})[indices] = tensor
            break
        else:
            strange.append(key)
    if strange:
        raise ValueError(f"`state_dict` holds weights that are none of {what}: {some(strange)}")
    for name in list(parts):
        found[name] = _joined(name, parts.pop(name))
    return found


PLACE = re.compile(r"(.*)\[([\\\d,]+)\]")


class Written(NamedTuple):
    """A published tensor, and the names of ours that it was made of."""

    name: str
    tensor: Tensor
    sources: tuple[str, ...]


def published(weights: Mapping[str, Tensor], rules: Sequence[Rule], what: str) -> list[Written]:
    """The other way: weights by their published names, by the rules of :func:`renamed`.

    The first rule counts whose right side gives a name. Where its pattern leaves a choice, its first alternative is
    written, and what is optional is written too.

    Args:
        weights: by our names.
        rules: of :func:`renamed`.
        what: the kind of model, for errors.

    Returns:
        The published tensors; those that are cut from one of ours are views of it.

    Raises:
        ValueError: a weight that no rule gives, by name.
    """
    found: list[Written] = []
    joined: set[str] = set()
    for name in weights:
        if name in joined:
            continue
        for pattern, becomes in rules:
            if isinstance(becomes, Parts):
                named = _parts_of(name, pattern, becomes)
                if named is not None:
                    theirs, ours = named
                    tensors = [_weight(weights, each, what) for each in ours]
                    found.append(Written(theirs, becomes.join(tensors), tuple(ours)))
                    joined.update(ours)
                    break
            elif becomes:
                how = spelling(pattern, becomes)
                match = how.match(name)
                if match is not None:
                    place = PLACE.fullmatch(becomes)
                    if place is None:
                        found.append(Written(how.write(match), weights[name], (name,)))
                    else:
                        siblings = _siblings(rules, place[1], place[2].count(","))
                        found += _apart(name, weights[name], siblings)
                    break
        else:
            raise ValueError(f"{what} has no place for the weight `{name}`")
    return found


def _siblings(rules: Sequence[Rule], base: str, depth: int) -> list[tuple[Spelling, str]]:
    """All rules whose tensors are parts of the same one of ours, and the place that each gives them."""
    found = []
    for pattern, becomes in rules:
        place = PLACE.fullmatch(becomes) if isinstance(becomes, str) else None
        if place is not None and isinstance(becomes, str) and place[1] == base and place[2].count(",") == depth:
            found.append((spelling(pattern, becomes), place[2]))
    return found


def _apart(name: str, tensor: Tensor, siblings: Sequence[tuple[Spelling, str]]) -> list[Written]:
    """A tensor that rules with places put together, as its parts were before."""
    found = []
    parts = tensor.chunk(len(siblings), dim=siblings[0][1].count(","))
    for (how, place), part in zip(siblings, parts, strict=True):
        match = how.match(name)
        assert match is not None
        if "," not in place:
            found.append(Written(how.write(match), part, (name,)))
        else:
            group = int(place.split(",")[0].removeprefix("\\"))
            found += [Written(how.write(match, {group: str(i)}), one, (name,)) for i, one in enumerate(part)]
    return found


def _parts_of(name: str, pattern: str, becomes: Parts) -> tuple[str, list[str]] | None:
    """The published name that one of its parts belongs to, and the names of all its parts."""
    for part in becomes.names:
        how = spelling(pattern, part)
        match = how.match(name)
        if match is not None:
            return how.write(match), [how.ours(match, other) for other in becomes.names]
    return None


def _weight(weights: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"{what} needs the weight `{name}`, which the model does not have")
    return weights[name]


@torch.no_grad()
def _joined(name: str, places: Mapping[tuple[int, ...], Tensor]) -> Tensor:
    """The tensors of one name in the order of their places."""
    counts = [max(place[i] for place in places) + 1 for i in range(len(next(iter(places))))]
    expected = torch.cartesian_prod(*(torch.arange(n) for n in counts)).reshape(-1, len(counts)).tolist()
    if len(expected) != len(places):
        missing = next(place for place in expected if tuple(place) not in places)
        raise ValueError(f"`state_dict` lacks part {', '.join(map(str, missing))} of {name}")
    if len(counts) == 1:
        return torch.cat([places[(i,)] for i in range(counts[0])])
    columns = [places[0, j] for j in range(counts[1])]
    joined = columns[0].new_empty(counts[0], sum(len(part) for part in columns), *columns[0].shape[1:])
    for i, whole in enumerate(joined):
        torch.cat([places[i, j] for j in range(counts[1])], out=whole)
    return joined
