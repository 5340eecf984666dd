"""The training loop over a mesh of processes."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from ssmzoo import parallel
from ssmzoo.mixer import Mixer
from ssmzoo.mlp import ShiftingChannelMixer
from ssmzoo.model import SequenceModel
from ssmzoo.pretrained import load
from ssmzoo.train import checkpoint, plot
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.corpora.packed import NOTHING, Packed
from ssmzoo.train.data import Data, Labelled, fixed_batches
from ssmzoo.train.loading import AnyData
from ssmzoo.train.log import Log, Row
from ssmzoo.train.loop import Trainer
from ssmzoo.train.masked import Masked
from ssmzoo.train.mesh.alike import check_alike, weights_of
from ssmzoo.train.mesh.engine import Engine
from ssmzoo.train.mesh.failures import telling
from ssmzoo.train.mesh.saving import Saver
from ssmzoo.train.mesh.weights import MeshWeights
from ssmzoo.train.output import Output
from ssmzoo.train.placing import with_blocks


class MeshTrainer(Trainer):
    """Takes the steps that one process would take, over the processes of a mesh.

    Losses are means over all targets of a step: each process's sum is divided by the number of targets that all have.
    """

    main_alone = True

    def __init__(
        self, model: SequenceModel, data: AnyData, config: TrainConfig, run: Path, accelerator: Any, name: str
    ):
        self.engine: Engine = accelerator
        check_mesh(model, data, config)
        prints = [part.fingerprint() for part in (data.train, data.validation)]
        check_alike({"model": model.config.to_yaml(), "out": str(run), "data": prints})
        self._start = weights_of(model)
        super().__init__(model, data, config, run, accelerator, name)
        self.saver = Saver(self.weights, self.optimizer, run, config)
        self._targets = torch.ones((), device=self.engine.device)

    @property
    def command(self) -> str:
        return resuming(self.run)

    def shares_of(self, accelerator: Any) -> tuple[int, int]:
        return self.engine.share, self.engine.shares

    def placed(self, model: SequenceModel) -> SequenceModel:
        with_blocks(model, self.config)
        if self.engine.parts > 1:
            for block in model.blocks:  # computed again without sending again
                whole_calls(block)
                block._gradient_checkpointing_func = partial(
                    recomputed, use_reentrant=False, context_fn=parallel.checkpoint_contexts
                )
        self.weights = MeshWeights(model, self.engine)
        return model

    def learner(self) -> torch.nn.Module:
        if self.engine.parts > 1:
            return parallel.context(self.model, self.engine.mesh["context"], how=self.engine.parallel.how)
        if self.weights.cut:
            return self.model
        return DistributedDataParallel(self.model)

    def restore(self, found: checkpoint.Checkpoint) -> None:
        check_alike({"checkpoint": found.folder.name})
        self.saver.restore(found)
        self.step, self._fresh = found.step, False
        self.sequences = found.step * self._a_step if found.sequences is None else found.sequences

    def fit(self, log: Log | None, output: Output | None = None) -> Row:
        def where() -> str:
            return f"process {self.engine.process_index} of {self.engine.num_processes}, at step {self.step}"

        with telling(self.run, where, self.command, self.saver.finish):
            if self._fresh:
                check_alike({"sum of weights": self._start})
            return super().fit(log, output)

    def finished(self) -> SequenceModel:
        return load(self.run) if self.engine.is_main_process else self.model

    def begin_step(self, parts: list[Any]) -> None:
        count = torch.tensor(sum(map(_targets, parts)), dtype=torch.float64, device=self.engine.device)
        self._targets = self.engine.reduce(count, "sum") / self.engine.parts

    def loss(self, learner: torch.nn.Module, drawn: Any) -> Tensor:
        """This process's part of the loss, so that the mean over all processes and passes is the loss."""
        logits, answers = self._predict(learner, drawn)
        nats = F.cross_entropy(logits, answers, ignore_index=NOTHING, reduction="sum")
        return nats * (self.engine.copies * self.config.accumulate / self._targets).to(nats)

    def _predict(self, model: torch.nn.Module, drawn: Any) -> tuple[Tensor, Tensor]:
        engine = self.engine
        with torch.autocast(engine.device.type, engine.precision or torch.bfloat16, engine.precision is not None):
            if engine.parts == 1:
                return super()._predict(self._wrapped, drawn)
            drawn, cu_seqlens = drawn.to(engine.device), None
            if isinstance(drawn, Packed):
                inputs, targets, cu_seqlens = drawn.inputs, drawn.targets[None], drawn.cu_seqlens
            else:
                inputs, targets = drawn[:, :-1], drawn[:, 1:]
            inputs, targets = (t.tensor_split(engine.parts, dim=1)[engine.part] for t in (inputs, targets))
            logits = self._wrapped(inputs, cu_seqlens=cu_seqlens).flatten(0, 1)
            return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()

    @torch.no_grad()
    def _evaluate(self) -> Row:
        """As on one process; every process takes part in as many forward passes, with a batch that counts or not."""
        config, share, shares = self.config, self.share, self.shares
        totals = torch.zeros(4, dtype=torch.float64, device=self.engine.device)
        batches = list(fixed_batches(self.data.validation, config.eval_batches, config.batch_size, config.length))
        self.model.eval()
        for first in range(0, len(batches), shares):
            place = first + share
            found = self.validate(batches[min(place, len(batches) - 1)])
            totals += found if place < len(batches) else torch.zeros_like(found)
        self.model.train()
        nats, count, right, distance = self.engine.reduce(totals, "sum").tolist()
        return self.validated(nats / count, right / count, distance / count)

    def _save(self, log: Log | None) -> None:
        with checkpoint.telling(self.run, "save", self.step, self.command):
            self.saver.save(self.step, self.sequences, final=self.step == self.config.steps)
            if log is not None:
                plot.draw(self.run / checkpoint.LOG, self.run / plot.FILE, self.name)
        self.engine.wait_for_everyone()


def whole_calls(block: nn.Module) -> None:
    """Compiled code calls what communicates as it is, and goes on after it."""
    for module in block.modules():
        if isinstance(module, Mixer | ShiftingChannelMixer):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]


def resuming(run: Path) -> str:
    """The command that goes on with a run over as many processes."""
    nodes, here = int(os.environ.get("GROUP_WORLD_SIZE", "1")), os.environ.get("LOCAL_WORLD_SIZE", "N")
    several = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {here} -m ssmzoo train --resume {run}"


def _targets(drawn: Any) -> int:
    """How many tokens or labels a model should tell."""
    if isinstance(drawn, Packed):
        return int((drawn.targets != NOTHING).sum())
    if isinstance(drawn, Masked):
        return len(drawn.answers)
    if isinstance(drawn, Labelled):
        return len(drawn.labels)
    return drawn.shape[0] * (drawn.shape[1] - 1)


def check_mesh(model: SequenceModel, data: Any, config: TrainConfig) -> None:
    """The settings go together.

    Raises:
        ValueError: naming one that does not.
    """
    sizes = config.parallel
    if sizes is None:
        return
    if sizes.context > 1 and not isinstance(data, Data):
        raise ValueError(
            f"training setting `parallel.context` must be 1 unless the model learns the next token; got {sizes.context}"
        )
    if sizes.how is not None and sizes.context == 1:
        raise ValueError(
            f"training setting `parallel.how` must be null unless `parallel.context` is at least 2; got {sizes.how!r}"
        )
    if config.sample_every:
        raise ValueError(
            f"training setting `sample_every` must be 0 with `parallel`; got {config.sample_every}: a sample comes at "
            "the end"
        )
