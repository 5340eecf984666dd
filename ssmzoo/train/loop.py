"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.model import SequenceModel
from ssmzoo.train import checkpoint, plot
from ssmzoo.train.config import TrainConfig
from ssmzoo.train.corpora.packed import NOTHING, Packed, PackedTokens, packed_loss
from ssmzoo.train.data import Data, Labelled, batch, fixed_batches
from ssmzoo.train.experts import Balance
from ssmzoo.train.interrupt import Interrupt, Interrupted
from ssmzoo.train.loading import AnyData
from ssmzoo.train.log import Log, Row
from ssmzoo.train.masked import Masked
from ssmzoo.train.optimizer import build_optimizer, lr_factor, set_lr
from ssmzoo.train.output import Output
from ssmzoo.train.placing import as_built, wide, with_blocks
from ssmzoo.train.rows import not_finite, rows_of
from ssmzoo.train.stored import DataChanged

if TYPE_CHECKING:
    from accelerate import Accelerator

REPORT = 10  # steps between two looks at the losses where a look costs a wait for a GPU or other processes


class Trainer:
    """Takes a model through its steps, and writes the run's folder.

    All that is random in a step follows from (seed, step, process), so a run that goes on from a checkpoint
    takes the very steps that it would have taken without the break.

    A subclass may learn something else: it defines :meth:`learner`, :meth:`loss` and :meth:`validate`.

    Attributes:
        writes_text: whether a sample of what the model writes tells how well it learns.
        main_alone: the main process alone has the model in the end.
    """

    writes_text = True
    main_alone = False

    def __init__(
        self, model: SequenceModel, data: AnyData, config: TrainConfig, run: Path, accelerator: Accelerator, name: str
    ):
        self.config, self.data, self.run, self.accelerator, self.name = config, data, run, accelerator, name
        self.step, self.sequences, self._fresh = 0, 0, True
        self.share, self.shares = self.shares_of(accelerator)
        self._a_step = config.batch_size * config.accumulate * self.shares  # sequences
        self.parameters = model.num_parameters()  # of which this process may have a share
        self.model = self.placed(model)
        self.balance = Balance(self.model)
        self.optimizer = build_optimizer(self.model, config)
        self._wrapped, self._stepper = accelerator.prepare(self.learner(), self.optimizer)
        waits = accelerator.num_processes > 1 or accelerator.device.type != "cpu"
        self._report_every = REPORT if waits else 1
        self._pending: list[tuple[float, Tensor]] = []  # learning rate; loss, gradient norm and perhaps load (2 or 3)
        self._clock = time.perf_counter()
        self.on_sample: Callable[[], object] = lambda: None  # called in every process, each `sample_every` steps

    @property
    def command(self) -> str:
        """How a run that stopped goes on."""
        return f"ssmzoo train --resume {self.run}"

    def shares_of(self, accelerator: Accelerator) -> tuple[int, int]:
        """Which share of a step's sequences this process learns from, and how many there are."""
        return accelerator.process_index, accelerator.num_processes

    def placed(self, model: SequenceModel) -> SequenceModel:
        """The model on its device."""
        return with_blocks(model, self.config).to(self.accelerator.device)

    def begin_step(self, parts: list[Any]) -> None:
        """Told all that a step learns from here, before it begins."""

    def learner(self) -> torch.nn.Module:
        """What a step calls."""
        return self.model

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Goes back to a checkpoint."""
        checkpoint.restore(found, self.model, self.optimizer)
        if found.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.scaler)
        self.step, self._fresh = found.step, False
        self.sequences = found.step * self._a_step if found.sequences is None else found.sequences

    def fit(self, log: Log | None, output: Output | None = None) -> Row:
        """Takes all steps that are left; returns the last validation: the log's columns that it fills.

        Args:
            log: given in the main process.
            output: where the log prints; the run is saved and stops when nobody reads it any more.

        Raises:
            ValueError: the loss or the gradient is no number any more.
            Interrupted: on SIGINT, SIGTERM or SIGHUP, or when the output is closed, after saving.
            DataChanged: a data file was cut while in use; the last whole step has been saved.
        """
        steps = self.config.steps
        validation: Row = {}
        self.model.train()
        with Interrupt() as interrupt:
            if self._fresh:
                validation = self._evaluate()
                self._write(log, [{"step": 0, **validation}])
                self._save(log)
            self._clock = time.perf_counter()
            while self.step < steps:
                if output is not None and output.closed_early:
                    interrupt.asked = True
                try:
                    self._take_step()
                except DataChanged:
                    self._save_whole_steps(log)
                    raise
                evaluates = self.step % self.config.eval_every == 0 or self.step == steps
                saves = self.step % self.config.save_every == 0 or self.step == steps
                samples = (
                    self.config.sample_every > 0 and self.step % self.config.sample_every == 0 and self.step < steps
                )
                alone = self.accelerator.num_processes == 1
                if not (
                    evaluates or saves or samples or self.step % self._report_every == 0 or (alone and interrupt.asked)
                ):
                    continue
                rows, stop = self._collect(interrupt.asked)
                self._check_finite(rows, log)
                if evaluates:
                    validation = self._evaluate()
                    rows[-1].update(validation)
                self._write(log, rows)
                if samples and not stop:
                    self.on_sample()
                if saves or stop:
                    self._save(log)
                if stop and self.step < steps:
                    raise Interrupted(self.run, self.step, self.command)
                self._clock = time.perf_counter()
        return validation or self._evaluate()  # nothing was left to do

    def finished(self) -> SequenceModel:
        """The model, once all steps are taken."""
        as_built(self.model, self.config)
        return self.model

    def _save_whole_steps(self, log: Log | None) -> None:
        """Saves what the steps before a broken one have made; other processes wait in theirs, so only if alone."""
        self.step -= 1
        if self.accelerator.num_processes > 1:
            return
        if self._pending:
            self._write(log, self._collect(False)[0])
        self._save(log)

    def _take_step(self) -> None:
        config = self.config
        self.step += 1
        torch.manual_seed(int(np.random.SeedSequence((config.seed, self.step, self.share)).generate_state(1)[0]))
        factor = lr_factor(self.step, config)
        set_lr(self.optimizer, factor)
        losses = []
        # A step has the same parts however many processes share them.
        parts = [self._draw(self.share * config.accumulate + i) for i in range(config.accumulate)]
        self.begin_step(parts)
        for drawn in parts:
            with self.accelerator.accumulate(self._wrapped):
                loss = self.loss(self._wrapped, drawn)
                self.accelerator.backward(self.balance.with_losses(loss))
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
                self._stepper.step()
                self._stepper.zero_grad()
            losses.append(loss.detach())
        self.sequences += self._a_step
        values = [torch.stack(losses).mean(), wide(norm.detach())]
        if self.balance:
            values.append(self.balance.after_step(lambda counts: self.accelerator.reduce(counts, "sum")))
        self._pending.append((config.lr * factor, torch.stack(values)))

    def loss(self, learner: torch.nn.Module, drawn: Any) -> Tensor:
        """What a step makes smaller, of a batch, in nats."""
        loss_of = packed_loss if isinstance(drawn, Packed) else F.cross_entropy
        return loss_of(*self._predict(learner, drawn))

    def bits(self, loss: float) -> Row:
        """The column of a training loss in bits."""
        return {f"bits_per_{self.data.unit}": self.data.bits(loss)}

    def _draw(self, part: int) -> Any:
        """A part of the sequences of a step."""
        config = self.config
        if isinstance(self.data.train, PackedTokens):
            first = self.sequences + part * config.batch_size
            return self.data.train.following(first, config.batch_size, config.length, config.seed)
        return batch(self.data.train, config.batch_size, config.length, (config.seed, self.step, part))

    def _predict(self, model: torch.nn.Module, drawn: Any) -> tuple[Tensor, Tensor]:
        """Logits (m c), and the m ids or labels that they should tell, NOTHING where they need not; ids come as
        (b l+1)."""
        drawn = drawn.to(self.accelerator.device)
        if isinstance(drawn, Masked):
            return wide(model(drawn.inputs)[drawn.chosen]), drawn.answers
        if isinstance(drawn, Labelled):
            return wide(model(drawn.inputs, mask=drawn.mask)), drawn.labels
        if isinstance(drawn, Packed):
            return wide(model(drawn.inputs, cu_seqlens=drawn.cu_seqlens).flatten(0, 1)), drawn.targets
        return wide(model(drawn[:, :-1]).flatten(0, 1)), drawn[:, 1:].flatten()

    @torch.no_grad()
    def _evaluate(self) -> Row:
        """The log's columns of the fixed validation batches, which the processes share out."""
        config, processes, process = (
            self.config,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        totals = torch.zeros(4, device=self.accelerator.device)
        self.model.eval()
        batches = fixed_batches(self.data.validation, config.eval_batches, config.batch_size, config.length)
        for i, drawn in enumerate(batches):
            if i % processes == process:
                totals += self.validate(drawn)
        self.model.train()
        nats, count, right, distance = self.accelerator.reduce(totals, "sum").tolist()
        return self.validated(nats / count, right / count, distance / count)

    def validate(self, drawn: Any) -> Tensor:
        """Of a batch: nats, tokens or labels, how many of them are right, and a distance for subclasses ``(4)``."""
        logits, answers = self._predict(self.model, drawn)
        nats, right = F.cross_entropy(logits, answers, reduction="sum"), (logits.argmax(1) == answers).sum()
        return torch.stack([nats, (answers != NOTHING).sum().to(nats), right.to(nats), torch.zeros_like(nats)])

    def validated(self, nats: float, right: float, distance: float) -> Row:
        """The log's columns, of means of what :meth:`validate` gives."""
        row = {"validation_loss": nats, f"validation_bits_per_{self.data.unit}": self.data.bits(nats)}
        return row if isinstance(self.data, Data) else row | {"validation_accuracy": right}

    def _collect(self, asked: bool) -> tuple[list[Row], bool]:
        """The rows of the steps since the last look, and whether any process was asked to stop."""
        rates, values = zip(*self._pending, strict=True)
        flag = torch.full_like(values[0], float(asked))[None]
        values = self.accelerator.reduce(torch.cat([torch.stack(values), flag]), "mean").tolist()
        seconds = time.perf_counter() - self._clock
        self._pending.clear()
        tokens = self._a_step * self.data.train.width(self.config.length) * len(rates) / seconds
        first = self.step - len(rates) + 1
        return rows_of(first, rates, values[:-1], tokens, self.bits), values[-1][0] > 0

    def _check_finite(self, rows: list[Row], log: Log | None) -> None:
        # In fp16 the loss scaler steps over infinite gradients by itself.
        found = not_finite(rows, ("loss",) if self.accelerator.scaler is not None else ("loss", "gradient_norm"))
        if found is None:
            return
        place, bad = found
        self._write(log, rows[:place])
        good = checkpoint.checkpoints(self.run)[-1].name
        raise ValueError(
            f"training diverged: the {bad.replace('_', ' ')} is {rows[place][bad]} at step {rows[place]['step']:.0f}; "
            f"continue from {good} with {self.command} and a smaller --set lr=..."
        )

    def _write(self, log: Log | None, rows: list[Row]) -> None:
        if log is not None:
            with checkpoint.telling(self.run, "write the log", self.step, self.command):
                log.write(rows)

    def _save(self, log: Log | None) -> None:
        if log is not None:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
            with checkpoint.telling(self.run, "save", self.step, self.command):
                checkpoint.write(
                    self.run, self.step, self.model, self.optimizer, scaler, self.config.keep, self.sequences
                )
                plot.draw(self.run / checkpoint.LOG, self.run / plot.FILE, self.name)
        self.accelerator.wait_for_everyone()
