"""What ``ssmzoo tokenize`` takes beside the tokenizer alone, the memory of its processes, and the loader beside a step.

A tokenizer is trained, and the command makes a corpus of text of the size that is asked for while its processes'
memory is watched. Then it and ``encode_batch`` alone, on as many threads as it has processes, take turns over the
first part of the text. At last batches are drawn from the corpus, and a model learns from them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

import ssmzoo
from ssmkernels.bench import Contest, Contestant, Measurement, Plan, refusal
from ssmkernels.bench.contest import blank
from ssmkernels.bench.terms import Role
from ssmzoo.bench.corpus_text import END, VOCABULARY, write_text, write_tokenizer
from ssmzoo.bench.watched import watched
from ssmzoo.train.corpora import read_manifest, tokenize
from ssmzoo.train.corpora.manifest import Manifest, sizes
from ssmzoo.train.corpora.packed import PackedTokens, load_corpus, packed_loss
from ssmzoo.train.corpora.tokenize import cores

KIND = "corpora"
DEFAULT = ("standard-library",)
SIZES = {"megabytes": 64, "compared": 16, "workers": cores(), "length": 1024, "batch": 4, "learnt_from": 4000}
QUICK = {"megabytes": 4, "compared": 2, "length": 128, "learnt_from": 200}
OURS, ALONE, STEP = "ssmzoo tokenize", "encode_batch alone", "a step"
BATCH = 256  # documents that encode_batch is given at once
TURNS, STEPS = 3, 5


def bench_corpora(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Makes a corpus in the system's temporary folder, and times what makes it and what reads it.

    ``plan.changes`` may hold the sizes in ``SIZES``: megabytes of text, and of these as many as the tokenizer alone is
    timed on; processes; tokens of a sequence and sequences of a batch; documents that the tokenizer is trained on.
    """
    asked = {**SIZES, **(QUICK if plan.quick else {}), **plan.changes}
    for key, value in asked.items():
        if value < 1:
            raise ValueError(f"--set {key}: must be at least 1; got {value}")
    if plan.device.type != "cpu" or plan.dtype != torch.float32:
        yield [refusal(KIND, name, OURS, "ours", "corpora are measured on a CPU, with a model in float32", plan)]
        return
    os.environ.setdefault("RAYON_NUM_THREADS", str(asked["workers"]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, tokenizer, corpus = folder / "text.jsonl", folder / "tokenizer.json", folder / "corpus"
        plan.say(f"{name}: {asked['megabytes']} MB of text and a tokenizer")
        write_tokenizer(tokenizer, asked["learnt_from"])
        write_text(text, asked["megabytes"] * 10**6)
        plan.say(f"{name}: making the corpus")
        yield [_made(name, text, tokenizer, corpus, asked, plan)]
        plan.say(f"{name}: {OURS} and {ALONE}")
        yield _compared(name, text, tokenizer, asked, plan)
        plan.say(f"{name}: loading beside training")
        yield _loaded(name, corpus, asked, plan)


def _made(name: str, text: Path, tokenizer: Path, corpus: Path, asked: Mapping[str, int], plan: Plan) -> Measurement:
    """The command itself, on all of the text."""
    command = [sys.executable, "-m", "ssmzoo", "tokenize", str(text), "--tokenizer", str(tokenizer), "--end", END]
    taken, peak = watched([*command, "--out", str(corpus), "--workers", str(asked["workers"])])
    made = read_manifest(corpus)
    shape = f"{asked['megabytes']} MB of text, {asked['workers']} processes"
    note = f"{made.tokens:,} tokens, {made.bytes / taken / 1e6:.1f} MB a second; memory is that of all processes"
    row = _row(Contest(KIND, name, "making a corpus", shape, ()), OURS, "ours", [taken], plan)
    return dataclasses.replace(
        row, tokens_per_second=made.tokens / taken, resident_bytes=peak, result_bytes=_written(made), note=note
    )


def _written(made: Manifest) -> int:
    """Bytes of all shards."""
    return sum(size for shard in made.shards for size in sizes(shard, made.dtype).values())


def _compared(name: str, text: Path, tokenizer: Path, asked: Mapping[str, int], plan: Plan) -> list[Measurement]:
    """Both on the first bytes of the text, in turns."""
    import tokenizers

    alone = tokenizers.Tokenizer.from_file(str(tokenizer))
    with text.open() as file:
        lines = list(itertools.takewhile(lambda line: line, file.readlines(asked["compared"] * 10**6)))
    texts, workers = [json.loads(line)["text"] for line in lines], asked["workers"]
    parts = [text.with_name(f"part{i}.jsonl") for i in range(workers)]  # as many files as processes: a shard each
    for i, part in enumerate(parts):
        part.write_text("".join(lines[i::workers]))
    out, tokens = text.with_name("again"), 0

    def ours() -> None:
        nonlocal tokens
        tokens = tokenize(parts, out, tokenizer, end=END, workers=workers).tokens - len(texts)

    def theirs() -> None:
        for first in range(0, len(texts), BATCH):
            encoded = alone.encode_batch(texts[first : first + BATCH], add_special_tokens=False)
            counted.append(sum(len(each.ids) for each in encoded))

    taken: dict[str, list[float]] = {OURS: [], ALONE: []}
    for turn in range(1 + TURNS):
        counted: list[int] = []
        shutil.rmtree(out, ignore_errors=True)
        for who, call in ((OURS, ours), (ALONE, theirs)):
            seconds = _seconds(call)
            if turn:
                taken[who].append(seconds)
        if tokens != sum(counted):
            raise RuntimeError(f"{OURS} wrote {tokens} tokens, where {ALONE} gives {sum(counted)}")
    contest = Contest(KIND, name, "tokenizing", f"{asked['compared']} MB of text, {workers} processes or threads", ())
    limit, mine = statistics.median(taken[ALONE]), statistics.median(taken[OURS])
    rows = [_row(contest, OURS, "ours", taken[OURS], plan), _row(contest, ALONE, "limit", taken[ALONE], plan)]
    rows[0] = dataclasses.replace(rows[0], note=f"{limit / mine:.2f} of the speed of {ALONE}")
    return [_beside(row, limit, ALONE, mine, tokens) for row in rows]


def _loaded(name: str, corpus: Path, asked: Mapping[str, int], plan: Plan) -> list[Measurement]:
    """Processor time of a batch, and of a step forward and backward with it, of a Mamba of four layers."""
    batch, length = asked["batch"], asked["length"]
    data = load_corpus(corpus, 0.05, length, None).train
    assert isinstance(data, PackedTokens)
    torch.manual_seed(0)
    model = ssmzoo.build("mamba-130m", d_model=256, n_layers=4, vocab_size=VOCABULARY)
    loads, steps = [], []
    for step in range(1 + STEPS):
        start = time.process_time()
        drawn = data.following(step * batch, batch, length, 0)
        loaded = time.process_time()
        logits = model(drawn.inputs, cu_seqlens=drawn.cu_seqlens).flatten(0, 1)
        packed_loss(logits.float(), drawn.targets).backward()
        if step:
            loads.append(loaded - start)
            steps.append(time.process_time() - loaded)
    contest = Contest(KIND, name, "loading", f"{batch} x {length} tokens, mamba, d_model 256, 4 layers", ())
    mine, limit = statistics.median(loads), statistics.median(steps)
    rows = [_row(contest, "the loader", "ours", loads, plan), _row(contest, STEP, "limit", steps, plan)]
    rows[0] = dataclasses.replace(rows[0], note=f"{mine / limit:.2%} of a step's processor time")
    return [_beside(row, limit, STEP, mine, batch * length) for row in rows]


def _row(contest: Contest, who: str, role: Role, seconds: Sequence[float], plan: Plan) -> Measurement:
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
    row = blank(contest, plan, Contestant(who, role, dict))
    return dataclasses.replace(row, median=statistics.median(seconds), low=low, high=high, samples=len(seconds))


def _beside(row: Measurement, limit: float, what: str, ours: float, tokens: int) -> Measurement:
    median = row.median or 0.0
    rate = tokens / median
    row = dataclasses.replace(row, limit=limit, limited_by=what, tokens_per_second=rate)
    return dataclasses.replace(row, of_limit=median / limit, of_ours=median / ours)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
