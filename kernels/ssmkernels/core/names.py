"""The ops by name, and the message for a name that does not exist."""

from __future__ import annotations

import difflib
from typing import Any

OPS: dict[str, Any] = {}  # name → ssmkernels.core.dispatch.Op


def unknown(what: str, name: object, known: Any) -> str:
    """The message for a name that does not exist: what does, and the nearest."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name)[:100], known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what}: {name!r:.100}.{hint} There are: {', '.join(known)}."
