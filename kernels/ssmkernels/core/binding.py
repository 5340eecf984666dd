"""The arguments of a call by name."""

from __future__ import annotations

import inspect
from typing import Any


class Binder:
    """Arguments by name, in the order of the signature; as :meth:`inspect.Signature.bind`, in a tenth of its time.

    Attributes:
        needed: parameters without a default.
        defaults: of the others, by name.
    """

    def __init__(self, signature: inspect.Signature):
        parameters = list(signature.parameters.values())
        self.signature = signature
        self.positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.needed = [p.name for p in parameters if p.default is p.empty]
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._blank = {p.name: p.default for p in parameters}
        self._place = {p.name: i if p.name in self.positional else len(parameters) for i, p in enumerate(parameters)}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        count = len(args)
        wrong = count > len(self.positional)
        for name in kwargs:
            wrong = wrong or self._place.get(name, -1) < count
        for name in self.needed[count:]:
            wrong = wrong or name not in kwargs
        if wrong:
            self.signature.bind(*args, **kwargs)  # raises Python's own error
        given = dict(self._blank)
        given.update(zip(self.positional, args, strict=False))
        given.update(kwargs)
        return given
