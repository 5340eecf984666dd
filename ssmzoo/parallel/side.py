"""What ops know of the call that they are part of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.line import Line


class Side(Protocol):
    """What ops know of the call that they are part of (:class:`ssmzoo.parallel.parts.Parts`)."""

    cut: Cut
    line: Line
    keeps: bool

    def window(self, x: Tensor, before: Tensor | None, width: int) -> tuple[Tensor, Tensor]: ...

    def note(self, what: str, how: str, in_turn: bool = False) -> None: ...
