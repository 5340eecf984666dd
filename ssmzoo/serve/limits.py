"""What a client may ask for."""

from __future__ import annotations

import dataclasses

from ssmzoo.generate.arguments import is_int, is_number


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a server; a request beyond one is refused before it costs anything.

    Args:
        body: most bytes of a request's body.
        tokens: most new tokens of an answer.
        choices: most answers of one request, over all of its prompts.
        waiting: most answers that wait for a place in the batch; further requests are refused until there is room.
        body_seconds: how long a body may take to arrive.
        idle_seconds: how long a connection may be without a request, or with an answer that nobody takes, up to twice
            as long.

    Raises:
        ValueError: a bound out of range.
    """

    body: int = 2**20
    tokens: int = 4096
    choices: int = 16
    waiting: int = 256
    body_seconds: float = 30.0
    idle_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, low in (("body", 1), ("tokens", 1), ("choices", 1), ("waiting", 0)):
            if not is_int(getattr(self, name), low):
                raise ValueError(f"Limits: `{name}` must be an int of at least {low}; got {getattr(self, name)!r:.80}")
        for name in ("body_seconds", "idle_seconds"):
            seconds = getattr(self, name)
            if not (is_number(seconds) and seconds > 0):
                raise ValueError(f"Limits: `{name}` must be above 0; got {seconds!r:.80}")
