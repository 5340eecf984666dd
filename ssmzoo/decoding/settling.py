"""Large pages under the weights of a model that goes on decoding.

To put them there costs a copy of the weights. A token gains a tenth of its time at best, so that the copy is worth it
after about a hundred tokens: a model that writes a short answer does without. Then each of the next tokens takes its
share, so that none is late.
"""

from __future__ import annotations

import weakref
from itertools import chain

from torch import nn

from ssmkernels.core.pages import Blocks, Spans, spans_of

AFTER = 64  # tokens, or steps of a batch, without large pages
SHARES = 64  # tokens among which the work is divided
AGAIN = 1024  # tokens between two looks whether weights lie elsewhere, as after a model was quantised


class _Course:
    """How far a model has come."""

    def __init__(self) -> None:
        self.tokens, self.next = 0, AFTER
        self.spans: Spans = frozenset()
        self.blocks, self.share = Blocks(self.spans), 0


_courses: weakref.WeakKeyDictionary[nn.Module, _Course] = weakref.WeakKeyDictionary()


def settle(model: nn.Module) -> None:
    """Counts a token of a model, and does what is due of it."""
    course = _courses.get(model)
    if course is None:
        course = _courses[model] = _Course()
    course.tokens += 1
    if course.tokens >= course.next:
        course.next = course.tokens + AGAIN
        spans = spans_of(chain(model.parameters(), model.buffers()))
        if spans != course.spans:
            course.spans, course.blocks = spans, Blocks(spans)
            course.share = -(-len(course.blocks) // SHARES)
    if course.blocks:
        course.blocks.collapse(course.share)


def settle_at_once(model: nn.Module) -> None:
    """Does all that is due in the course of a long text, as for measurements in the middle of one."""
    for _ in range(AFTER + SHARES):
        settle(model)
