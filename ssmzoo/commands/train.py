"""``ssmzoo train``: a language model or a classifier, from scratch or from where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmzoo.commands._settings import parse_settings, settings_option, texts_option
from ssmzoo.commands._stopping import stopping


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model's name (see `ssmzoo list`), a YAML file, or the folder of a saved model to "
            "train on. Not needed with --resume.",
        ),
    ] = None,
    more_data: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="")] = None,
    data: Annotated[
        list[str] | None,
        texts_option(
            "UTF-8 text files, or folders of them; or a corpus of `ssmzoo tokenize`; by default the source of Python's "
            "standard library. For a classifier, a .npz file and optionally a second one for validation."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The folder for the results; runs/MODEL-TIME by default."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        settings_option("A training setting such as steps=500, or a config key such as mixers.mamba.d_state=32."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Continue the run in this folder.")] = None,
) -> None:
    """Train a language model on text, or a classifier on labelled sequences.

    Text is read as bytes, unless `--set tokenizer=FILE` names a file of the tokenizers library. A classifier's .npz
    file has `inputs` (n, l) of token ids or (n, l, d_input) of numbers, `labels` (n), and `lengths` (n) if they differ.
    The run's folder receives the config, the weights, a log and the loss curve. Ctrl-C saves the run and shows how to
    continue it. Over many GPUs: `torchrun --nproc-per-node 8 -m ssmzoo train MODEL --set parallel.shard=8`, and
    parallel.data, parallel.context and parallel.tensor likewise; parallel.how=ring, heads, window or balanced forces a
    way of attention with parallel.context.
    """
    from ssmkernels import keep_memory
    from ssmzoo import train as training
    from ssmzoo.config import load_config, model_folder
    from ssmzoo.devices import fit_threads
    from ssmzoo.train.config import split_settings
    from ssmzoo.train.record import read_record
    from ssmzoo.train.run import run_name

    if more_data and not data:
        raise ValueError(f"give one model; got {more_data[0]!r} as well. Text to train on goes after --data")
    sources = [*(data or []), *(more_data or [])] or None
    keep_memory()
    fit_threads()
    changes, overrides = split_settings(parse_settings(settings or []))
    with stopping():
        if resume is not None:
            if out is not None:
                raise ValueError("--resume continues in the folder of the run; leave out --out")
            if overrides:
                raise ValueError(f"--set {next(iter(overrides))} cannot change: --resume keeps the model of the run")
            if model is not None and run_name(model) != read_record(resume).model:
                raise ValueError(f"`MODEL`: the run in {resume} trains {read_record(resume).model}, not {model}")
            if "data" in changes and sources:
                raise ValueError("--set data names a corpus, and --data does already: leave one out")
            training.resume(resume, changes.pop("data", None) or sources, **changes)
            return
        if model is None:
            raise ValueError(
                "`MODEL` is missing; name one, as in `ssmzoo train mamba-hybrid-tiny`. `ssmzoo list` shows all models"
            )
        if model_folder(model) is not None:
            if overrides:
                raise ValueError(f"--set {next(iter(overrides))} cannot change: {model} holds trained weights")
            training.train(model, sources, changes, out)
        else:
            training.train(load_config(model).override(overrides), sources, changes, out, name=run_name(model))
