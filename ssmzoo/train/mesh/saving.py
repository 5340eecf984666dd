"""Checkpoints that all processes of a mesh write together, and that any other mesh, or one process, goes on from."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from ssmzoo.checkpoints import checksums, sharded
from ssmzoo.checkpoints.sharded import OPTIMIZER_KIND, WEIGHTS_KIND, key_of
from ssmzoo.files import sync
from ssmzoo.pretrained import CONFIG, WEIGHTS
from ssmzoo.train import checkpoint
from ssmzoo.train.checkpoint import Checkpoint
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.mesh.failures import telling_files
from ssmzoo.train.mesh.weights import MeshWeights


class Begun(NamedTuple):
    """A checkpoint whose tensors are being written."""

    written: Any  # a future
    folder: Path
    temporary: Path


class Saver:
    """Writes and reads the checkpoints of a run.

    A checkpoint's folder gets its name once all processes have written all of it. Until then it has another one, which
    nobody reads, and which whoever goes on with the run sweeps away.
    """

    def __init__(self, weights: MeshWeights, optimizer: torch.optim.Optimizer, run: Path, config: TrainConfig):
        self._weights, self._optimizer, self._run, self._keep = weights, optimizer, run, config.keep
        self._engine = weights.engine
        self._begun: Begun | None = None
        # Of its own, as it communicates while the next steps do
        self._group = dist.new_group(backend="gloo") if self._engine.parallel.asynchronous else None

    def save(self, step: int, sequences: int, final: bool) -> None:
        """Adds a checkpoint, and removes all but the newest; with ``final`` also makes the run's own weights of it."""
        self.finish()
        folder, main = self._run / checkpoint.FOLDER / f"step-{step:07d}", self._engine.is_main_process
        temporary = folder.with_name(f".{folder.name}.tmp")
        if not self._engine.agreed(folder.exists()):  # otherwise the run was stopped again before its first step
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                self._write_texts(temporary, step, sequences)
            self._engine.wait_for_everyone()
            writer = dcp.FileSystemWriter(temporary)
            if self._group is None or final:
                with self._swept(temporary):
                    dcp.save(self._tensors(), storage_writer=writer)
                self._name(folder, temporary)
            else:
                written = dcp.async_save(self._tensors(), storage_writer=writer, process_group=self._group)
                self._begun = Begun(written, folder, temporary)
        if main and final:
            checkpoint.settle(self._run, folder, self._keep)

    def finish(self) -> None:
        """Waits for a checkpoint that is being written, and gives it its name."""
        if self._begun is not None:
            written, folder, temporary = self._begun
            self._begun = None
            with self._swept(temporary):
                written.result()
            self._name(folder, temporary)

    @contextlib.contextmanager
    def _swept(self, temporary: Path) -> Iterator[None]:
        """Of a checkpoint that cannot be written nothing stays, as the disk may be full."""
        try:
            with telling_files():
                yield
        except OSError:
            if self._engine.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def restore(self, found: Checkpoint) -> None:
        """Goes back to a checkpoint, of whatever mesh or of one process.

        Raises:
            ValueError: it belongs to another model.
        """
        weights = dict(self._weights.tensors())
        states = self._new_states(found.without)
        if sharded.is_sharded(found.folder):
            layouts = sharded.read_layouts(found.folder)
            if layouts == (self._weights.layouts, self._engine.parallel.tensor):
                self._check_keys(found, self._tensors())
                with telling_files():
                    dcp.load(self._tensors(), storage_reader=dcp.FileSystemReader(found.folder))
                return
        for group in _by_layer(weights):
            tensors, moments = self._whole(found, group)
            for name in group:
                _put(self._weights, name, weights[name], tensors, name, found)
                for quantity, state in states.get(name, {}).items():
                    _put(self._weights, name, state, moments, f"{name}/{quantity}", found)

    def _whole(self, found: Checkpoint, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Whole weights by their names, and the optimiser's quantities of them."""
        if not sharded.is_sharded(found.folder):
            return found.weights, found.optimizer
        weights = sharded.read_whole(found.folder, WEIGHTS_KIND, names)
        return weights, sharded.read_whole(found.folder, OPTIMIZER_KIND, names)

    def _check_keys(self, found: Checkpoint, tensors: dict[str, Tensor]) -> None:
        stored, here = (
            {key.partition("@")[0] for key in keys} for keys in (sharded.stored_keys(found.folder), tensors)
        )
        if stored != here:
            key, folder = min(stored ^ here), found.folder
            raise ValueError(f"{folder} does not fit the model: it differs in {key}")

    def _new_states(self, without: list[str]) -> dict[str, dict[str, Tensor]]:
        """The optimiser's state, made anew, of each parameter that had one."""
        found = {}
        for name, parameter in self._parameters():
            if name in without:
                continue
            zeros = {quantity: torch.zeros_like(parameter) for quantity in ("exp_avg", "exp_avg_sq")}
            found[name] = {"step": torch.zeros((), device=parameter.device), **zeros}
            self._optimizer.state[parameter] = found[name]
        return found

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._weights.tensors() if isinstance(p, nn.Parameter) and p.requires_grad]

    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by its keys."""
        found = {}
        for name, tensor in self._weights.tensors():
            piece = self._weights.piece(name)
            found[key_of(WEIGHTS_KIND, name, piece)] = tensor.detach()
            for quantity, state in self._optimizer.state.get(tensor, {}).items():
                found[key_of(OPTIMIZER_KIND, name, None if state.ndim == 0 else piece, quantity)] = state
        return found

    def _write_texts(self, folder: Path, step: int, sequences: int) -> None:
        """What a checkpoint holds beside its tensors; by the main process."""
        without = [name for name, p in self._parameters() if p not in self._optimizer.state]
        layouts = sharded.layouts_text(self._weights.layouts, self._engine.parallel.tensor)
        (folder / sharded.LAYOUTS).write_text(layouts)
        (folder / CONFIG).write_text(self._weights.model.config.to_yaml())
        checkpoint.write_state(self._run, folder, step, None, sequences, without)

    def _name(self, folder: Path, temporary: Path) -> None:
        """Gives a checkpoint its name, once all of it is on disk; removes old ones."""
        self._engine.wait_for_everyone()
        if self._engine.is_main_process:
            checksums.seal(temporary)
            temporary.rename(folder)
            sync(folder.parent)
            for stale in (checksums.SUMS, WEIGHTS):  # of an earlier end of the run
                (self._run / stale).unlink(missing_ok=True)
            checkpoint.prune(self._run, self._keep)
        self._engine.wait_for_everyone()


def _by_layer(names: dict[str, Tensor]) -> list[list[str]]:
    """Names by the layer that they belong to, so that few weights at a time are whole."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:2]) if name.startswith("layers.") else "", []).append(name)
    return list(groups.values())


def _put(
    weights: MeshWeights, name: str, into: Tensor, tensors: dict[str, Tensor], key: str, found: Checkpoint
) -> None:
    folder = found.folder
    if key not in tensors:
        raise ValueError(f"{folder} does not fit the model: it has no {key}")
    if into.ndim == 0:
        into.copy_(tensors[key])
    else:
        weights.put(name, into, tensors[key])
