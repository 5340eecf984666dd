"""What a student learns from a transformer in three stages (MOHAWK; Bick et al. 2024, arXiv 2408.10189, section 4).

With u the input that the transformer gives to a layer whose attention was replaced, and l tokens::

    matrix:  Σ_h ‖M'_h(u) - M_h(u)‖² / (h l)     the matrices by which heads mix tokens; M is the softmax of attention
    hidden:  ‖f'(u) - f(u)‖² / ‖f(u)‖²            the layer's outputs
    logits:  KL(p ‖ p')                           of next tokens, in nats a token, from end to end

The first two are means over the layers, each of which learns on its own. What stands between and behind them learns in
the last stage alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.mixer import Mixer
from ssmzoo.model import SequenceModel

Stage = Literal["matrix", "hidden", "logits"]
STAGES: tuple[Stage, ...] = ("matrix", "hidden", "logits")


class Alignment(nn.Module):
    """How far a student is from its teacher, as a module, so that any means of training may wrap it.

    Args:
        teacher: the transformer; it learns nothing.
        student: the same model with other mixers in some layers.
        layers: these layers.
        stage: which distance.
    """

    def __init__(self, teacher: SequenceModel, student: SequenceModel, layers: Sequence[int], stage: Stage):
        super().__init__()
        self.teacher, self.student = teacher.eval().requires_grad_(False), student
        self.layers, self.stage = list(layers), stage

    def train(self, mode: bool = True) -> Alignment:
        """The student alone."""
        self.student.train(mode)
        return self

    def freeze(self) -> None:
        """Lets those weights of the student learn that the stage reaches, and no others."""
        self.student.eval().requires_grad_(True)
        self(torch.zeros(1, 2, dtype=torch.long, device=self.student.device)).backward()
        for parameter in self.student.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def forward(self, ids: Tensor) -> Tensor:
        """Ids ``(b, l)`` → the mean distance."""
        if self.stage == "logits":
            with torch.no_grad():
                wanted = self.teacher(ids).float().log_softmax(-1)
            found = self.student(ids).float().log_softmax(-1)
            return F.kl_div(found.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
        seen = self._seen(ids)
        return torch.stack([self._distance(i, *seen[i]) for i in self.layers]).mean()

    def _distance(self, layer: int, u: Tensor, y: Tensor) -> Tensor:
        """Of a layer, given the input and the output of the teacher's (b l d_model)."""
        student = self.student.blocks[layer].mixer
        if self.stage == "hidden":
            return _squared(student(u) - y) / _squared(y).clamp(min=1e-12)
        with torch.no_grad():
            wanted = self.teacher.blocks[layer].mixer.matrix(u)
        b, h, l, _ = wanted.shape
        return _squared(student.matrix(u) - wanted) / (b * h * l)

    @torch.no_grad()
    def _seen(self, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """What the teacher's mixers in these layers are given, and give."""
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(layer: int):
            def hook(mixer: Mixer, args: tuple, output: Tensor) -> None:
                found[layer] = (args[0], output)

            return hook

        hooks = [self.teacher.blocks[i].mixer.register_forward_hook(keep(i)) for i in self.layers]
        try:
            self.teacher(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return found


def _squared(x: Tensor) -> Tensor:
    return x.float().square().sum()
