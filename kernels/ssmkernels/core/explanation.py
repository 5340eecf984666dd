"""The answer to which implementation a call takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """What became of one implementation in one call: ``reason`` is empty where it could run."""

    implementation: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call takes, and why each other one was passed over.

    ``chosen`` is the name of the one that would run; ``choices`` has every implementation, fastest first; ``able`` are
    those that could run the call.
    """

    op: str
    chosen: str
    origin: str
    choices: tuple[Choice, ...]
    able: tuple[str, ...]

    @property
    def reasons(self) -> dict[str, str]:
        """Implementation name → why it would not run; without the chosen one."""
        return {c.implementation: c.reason for c in self.choices if c.implementation != self.chosen}

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen} runs ({self.origin})"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)

    __repr__ = __str__


class Explained(Exception):
    """Carries an explanation out of a public function without running anything.

    ``arguments`` are what the chosen implementation would get, as a named tuple.
    """

    def __init__(self, explanation: Explanation, arguments: Any = None):
        self.explanation, self.arguments = explanation, arguments
