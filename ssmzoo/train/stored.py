"""Arrays in files, of which the part that is asked for is read."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import numpy as np


class DataChanged(ValueError):
    """A data file is shorter than when the run opened it, or gone."""


class Stored:
    """The numbers of a file, or of a part of it, read when they are asked for.

    A file that is mapped into memory and then cut would end the process by SIGBUS.

    Args:
        path: the file, which holds the numbers and nothing else.
        dtype: of a number.
        kept_open: keep the file open, so that it may be replaced meanwhile; without, thousands of files may be in use.

    Raises:
        DataChanged: when a part is read that is no longer there.
    """

    def __init__(self, path: Path, dtype: type[np.generic] | np.dtype = np.uint8, *, kept_open: bool = True):
        self._path, self._dtype = path, np.dtype(dtype)
        self._file = path.open("rb", buffering=0) if kept_open else None
        self._start, self._length = 0, path.stat().st_size // self._dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def part(self, part: slice) -> Stored:
        """A part, which is not read yet."""
        start, stop, _ = part.indices(self._length)
        other = copy.copy(self)
        other._start, other._length = self._start + start, max(0, stop - start)
        return other

    def __getitem__(self, part: slice | int) -> np.ndarray:
        if isinstance(part, int):  # one number, as `cut` looks at
            return self[part : part + 1][0]
        start, stop, _ = part.indices(self._length)
        size = self._dtype.itemsize
        found = self._read((self._start + start) * size, max(0, stop - start) * size)
        return np.frombuffer(found, self._dtype)

    def _read(self, start: int, wanted: int) -> bytes:
        try:
            with contextlib.nullcontext(self._file) if self._file else self._path.open("rb", buffering=0) as file:
                file.seek(start)
                found = b""
                while len(found) < wanted:
                    more = file.read(wanted - len(found))
                    if not more:
                        raise DataChanged(
                            f"the data file {self._path} was cut while it was in use: put it back, and resume"
                        )
                    found += more
        except FileNotFoundError:
            raise DataChanged(f"the data file {self._path} is gone: put it back, and resume") from None
        return found
