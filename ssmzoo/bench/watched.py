"""A command, and the most memory that it and all processes that it starts have at once."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

PAUSE = 0.2  # seconds between two looks
ANONYMOUS, FILES = ("Pss_Anon:", "Pss_Shmem:"), ("Pss_File:",)


def watched(command: Sequence[str]) -> tuple[float, int]:
    """Runs a command to its end: its seconds, and the peak of its processes' memory in bytes; 0 without Linux's /proc.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            while process.poll() is None:
                peak = max(peak, memory_of(family(process.pid)))
                time.sleep(PAUSE)
        finally:
            process.kill()
            process.wait()
        taken = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command[0]} ended with status {process.returncode}: {said.read()[-1000:].strip()}")
    return taken, peak


def family(root: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended
            continue
    found = {root}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def memory_of(processes: Iterable[int]) -> int:
    """Bytes that processes take together: what they have made, of which several share some, and files that are mapped.

    Of a library that strangers have mapped as well, the system ascribes only a part to these; so files count as much as
    the one of these processes that has most of them says, at least.
    """
    made = files = most = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            status = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        made += sum(_bytes(lines, name) for name in ANONYMOUS)
        files += sum(_bytes(lines, name) for name in FILES)
        most = max(most, _bytes(status, "RssFile:"))
    return made + max(files, most)


def _bytes(lines: Sequence[str], name: str) -> int:
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
