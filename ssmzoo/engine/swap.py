"""States that are put away to make room, and brought back as they were."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from pathlib import Path

import torch

from ssmzoo.state import State


class Swapped:
    """A state of one sequence in a file, or, from a device that is no CPU, in the host's memory.

    Args:
        state: what is put away.
        folder: for its file; None for the host's memory.
        number: of the file.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, state: State, folder: Path | None, number: int):
        stored = state.stored()
        self.kept = stored.to("meta" if folder is not None else "cpu")
        self.path = None if folder is None else folder / f"{number}.pt"
        if self.path is not None:
            try:
                torch.save([t.contiguous() for t in stored.tensors()], self.path)
            except Exception as error:  # PyTorch has one of its own for a full disk
                self.drop()
                raise OSError(f"Engine: the state of a request cannot be put away at {self.path}: {error}") from error

    def bring_back(self, template: State) -> State:
        """The state as it was, with its pages in the template's pools; the file goes, even a damaged one.

        Raises:
            OSError: the file is gone or damaged.
        """
        stored, device = self.kept, template.tensors()[0].device
        if self.path is not None:
            try:
                tensors = torch.load(self.path, weights_only=True, map_location=device)
            except Exception as error:
                self.drop()
                raise OSError(f"Engine: the state put away at {self.path} cannot be read back: {error}") from error
            stored = stored.with_tensors(iter(tensors))
        self.drop()
        return template.restored(stored.to(device))

    def drop(self) -> None:
        """Removes the file; one that cannot be removed goes with its folder."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()


class Store:
    """Where states are put away; its folder is made when the first one comes, and goes with it.

    Args:
        folder: in which to make it; None for that of the system's temporary files, or, where states are on another
            device than a CPU, for the host's memory.
        device: of the states.

    Raises:
        ValueError: ``folder`` is none.
    """

    def __init__(self, folder: str | Path | None, device: torch.device):
        if folder is not None and not (isinstance(folder, str | Path) and Path(folder).is_dir()):
            raise ValueError(f"Engine: `swap` must be a folder that exists, or None; got {str(folder)!r:.200}")
        self.within, self.on_disk = folder, folder is not None or device.type == "cpu"
        self.folder: Path | None = None

    def put_away(self, state: State, number: int) -> Swapped:
        """Takes a state of one sequence, under a number of its own."""
        if self.on_disk and self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="ssmzoo-states-", dir=self.within))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        return Swapped(state, self.folder, number)
