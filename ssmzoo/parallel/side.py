"""What ops know of the call that they are part of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.layout import Layout
from ssmzoo.parallel.line import Line
from ssmzoo.parallel.steps import Traffic


class Side(Protocol):
    """What ops know of the call that they are part of (:class:`ssmzoo.parallel.parts.Parts`)."""

    cut: Cut
    layout: Layout
    line: Line
    keeps: bool
    how: str | None

    def window(self, x: Tensor, before: Tensor | None, width: int) -> tuple[Tensor, Tensor]: ...

    def note(self, what: str, how: str, traffic: Traffic, in_turn: bool = False) -> None: ...

    def channels(self, tensors: list[Tensor]) -> list[Tensor]: ...

    def tokens(self, y: Tensor, channels: int) -> Tensor: ...

    def share(self, channels: int) -> slice: ...
