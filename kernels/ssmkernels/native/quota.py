"""The share of the machine's time that a container gives this process, in cores."""

from __future__ import annotations

import math
from pathlib import Path


def cores(root: Path = Path("/")) -> int | None:
    """How many cores the quotas of the process's control groups are worth, rounded up; None where there is no quota.

    More threads than that take each other's time: the whole process is halted once its quota is used up.
    """
    quotas = [quota for folder in _folders(root) if (quota := _quota(folder)) is not None]
    return max(1, math.ceil(min(quotas))) if quotas else None


def _folders(root: Path) -> list[Path]:
    """Where the quotas of this process's group and of those around it are written, by either version of cgroup."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:  # "0::/outer/inner", or of version 1 "4:cpu,cpuacct:/outer/inner"
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = top / group.lstrip("/")
        found += [folder, *(outer for outer in folder.parents if outer.is_relative_to(top))]
    return found


def _quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()  # "50000 100000", or "max 100000"
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
