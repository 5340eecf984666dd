"""What a check of an implementation found."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing checked: its error as a part of its budget, and, where it failed, why and a line that does it again."""

    row: str
    dtype: str
    what: str
    used: float
    failure: str = ""
    line: str = ""

    def __str__(self) -> str:
        return f"[{self.row}; {self.dtype}] {self.failure or self.what}" + (f"\n  {self.line}" if self.line else "")


@dataclasses.dataclass
class Report:
    """All checks of one implementation of an op. ``skipped`` says which cases (row, dtype) it cannot run, and why."""

    op: str
    implementation: str
    checks: list[Check] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.failure]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.implementation}: {len(self.checks)} checks, {len(self.failures)} failed"]
        lines.append(f"  {'case':<44} {'dtype':<9} {'checks':>6} {'worst':>7}  (error as a part of its budget)")
        groups: dict[tuple[str, str], list[Check]] = {}
        for one in self.checks:
            groups.setdefault((one.row, one.dtype), []).append(one)
        for (row, dtype), group in groups.items():
            worst = max(group, key=lambda c: c.used)
            lines.append(f"  {row:<44} {dtype:<9} {len(group):>6} {worst.used:>7.2f}  {worst.what}")
        lines += [f"  {row:<44} {dtype:<9} skipped: {why}" for row, dtype, why in self.skipped]
        return "\n".join([*lines, *map(str, self.failures)])
