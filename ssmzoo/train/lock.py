"""One process at a time writes to a run's folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ssmzoo.files import naming

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds a run's lock, which the system gives up by itself when the process dies.

    Raises:
        ValueError: another process holds it; says which one, and where.
    """
    path = run / FILE
    descriptor = _open(path)
    try:
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        # The file stays where a process is killed: it tells that a run was started here.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _open(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, host = os.pread(descriptor, 1000, 0).decode(errors="replace").strip().partition(" ")
            os.close(descriptor)
            holder = f"process {pid} on {host}" if host else "another process"
            raise ValueError(f"{path.parent} is in use by {holder}: wait until it ends, or stop it") from None
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its holder has just removed it: the next one is another file
