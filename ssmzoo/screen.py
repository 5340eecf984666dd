"""What people read on a screen: text that came from outside is shown, and steers nothing."""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

# Control characters but line ends and tabs, characters that turn the direction of text around, further line ends, and
# halves of pairs (a path that is no UTF-8 has them), which no stream takes.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with whatever could steer a terminal spelled out, as in ``\\x1b``."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def drawable(text: str) -> str:
    """The text for matplotlib: printable, and a dollar sign is one, not the start of a formula."""
    return printable(text).replace("$", r"\$")


def say(text: object, file: TextIO | None = None) -> None:
    """Prints a line of text that may hold names and paths from outside."""
    print(printable(str(text)), file=file or sys.stdout, flush=True)


class Screen(Console):
    """A rich console that takes every string as it is: no markup, no emoji codes, no control characters.

    Strings in tables are covered too. Style comes from the argument ``style`` and from ``Text``, whose content has to
    go through :func:`printable` where it is not ours.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        plain = {"emoji": False, "markup": False, "highlight": False, "highlighter": None}
        return super().render_str(printable(text), **{**options, **plain})
