"""Names of weights in a published checkpoint, turned into ours by rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ssmzoo.checkpoints.weights import some

Rule = tuple[str, str | tuple[str, ...] | Callable[[re.Match[str], Tensor], dict[str, Tensor]]]


def renamed(weights: dict[str, Tensor], rules: Sequence[Rule], what: str) -> dict[str, Tensor]:
    """Weights by our names; they are taken out of ``weights``, so that of joined ones one at a time is there twice.

    A rule is a regular expression for a whole name, and what it becomes, where groups are written as in
    :func:`re.sub`. The first rule that matches counts. What it becomes may be

    - a name;
    - a name with a place in brackets: tensors of one name are put one after another along their rows, ``name[0]``,
      ``name[1]``; or stacked first and put one after another then, ``name[3,0]``;
    - several names: the tensor is cut along its rows into as many equal parts;
    - a function of the match and the tensor, which returns the tensors that it becomes by their names;
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
            if isinstance(becomes, tuple):
                found |= {match.expand(name): t for name, t in zip(becomes, tensor.chunk(len(becomes)), strict=True)}
            elif callable(becomes):
                found |= becomes(match, tensor)
            elif becomes:
                name = match.expand(becomes)
                place = re.fullmatch(r"(.*)\[([\d,]+)\]", name)
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
