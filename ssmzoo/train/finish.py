"""The steps of a run that are left, and what it leaves in the end."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

from ssmzoo.model import SequenceModel
from ssmzoo.screen import Screen
from ssmzoo.train import checkpoint
from ssmzoo.train.boards import Meter, boards_of
from ssmzoo.train.data import Data
from ssmzoo.train.labelled import LabelledData
from ssmzoo.train.log import Log
from ssmzoo.train.loop import Trainer
from ssmzoo.train.masked import MaskedData
from ssmzoo.train.output import Output
from ssmzoo.train.sample import continued, filled
from ssmzoo.train.vocabulary import Vocabulary

PROMPT, SAMPLE = 200, 300  # bytes of the sample at the end of a run


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves.

    Attributes:
        model: the trained model, on the device that it was trained on. Over a mesh of processes, the first one has it
            on the CPU, and each of the others its own part.
        folder: config, weights, settings, log, curve and checkpoints.
        steps: steps taken in all.
        validation_loss: nats a token, a masked token, or a label, at the end.
        validation_bits: the same in bits a byte (a token where the data were ids; a masked token; a label).
        validation_accuracy: the fraction of labels that a classifier got right, or of masked tokens; None for a model
            of the next token.
        sample: a piece of held-out text and how the model goes on from it, or with masked tokens filled in by it; None
            where there was no text.
    """

    model: SequenceModel
    folder: Path
    steps: int
    validation_loss: float
    validation_bits: float
    validation_accuracy: float | None
    sample: str | None


def finish(trainer: Trainer, vocabulary: Vocabulary | None, quiet: bool) -> Result:
    """All the steps that are left, and the sample."""
    run, data, main = trainer.run, trainer.data, trainer.accelerator.is_main_process
    output = Output(sys.stdout)
    console = Screen(file=output, quiet=quiet or not main, soft_wrap=True)  # type: ignore[arg-type]
    what = "sequences" if isinstance(data, LabelledData) else "tokens"
    console.print(
        f"{trainer.name}: {trainer.parameters:,} parameters on {trainer.accelerator.device}, "
        f"{len(data.train):,} {what} to train on, {len(data.validation):,} held out; "
        f"writes to {run}"
    )
    if (run / checkpoint.FOLDER).is_dir():
        console.print(f"continues from step {trainer.step} of {trainer.config.steps}")

    def show_sample() -> str:
        assert vocabulary is not None
        model, seed = trainer.model, trainer.config.seed
        if isinstance(data, MaskedData):
            what, shown, text = filled(model, data, vocabulary, SAMPLE, seed)
        else:
            assert isinstance(data, Data)
            what, shown, text = continued(model, data, vocabulary, PROMPT, SAMPLE, seed)
        console.print(f"\n{what}\n")
        console.print(shown)
        return text

    if vocabulary is not None and main and trainer.writes_text:
        trainer.on_sample = show_sample
    with contextlib.ExitStack() as stack:
        # Mixed precision wraps the model's forward.
        stack.callback(trainer.accelerator.unwrap_model, trainer.model, keep_fp32_wrapper=False)
        log = None
        if main:
            config, step = trainer.config, trainer.step
            meter = None
            if config.log.utilisation:
                accelerator = trainer.accelerator
                meter = Meter(trainer.model, config, accelerator.device, accelerator.num_processes)
            boards = boards_of(config, run, step)
            log = Log(
                run / checkpoint.LOG, data.unit, step, config.steps, console, bool(trainer.balance), boards, meter
            )
            stack.enter_context(log)
        validation = trainer.fit(log, output)
    sample, trainer.model = None, trainer.finished()
    if vocabulary is not None and trainer.writes_text and (main or not trainer.main_alone):
        sample = show_sample()
        then = "" if isinstance(data, MaskedData) else f' Try: ssmzoo generate {run} "def "'
        console.print(f"All of it is in {run}.{then}")
    loss, bits = validation["validation_loss"], validation[f"validation_bits_per_{data.unit}"]
    return Result(trainer.model, run, trainer.step, loss, bits, validation.get("validation_accuracy"), sample)
