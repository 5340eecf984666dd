"""What ``ssmzoo tokenize`` takes beside the tokenizer alone, and the loader beside a step: ``python -m
ssmzoo.bench.corpora``.

Documents are stretches of the Python standard library's source, from some dozens of characters to 16 Ki, in each of
which some words get other endings, so that no two are alike. A tokenizer is trained on a few of them. Then the corpus
is made, and parts of its text are encoded by ``encode_batch`` alone, on as many threads as the corpus had processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ssmzoo
from ssmkernels.bench.words import counted
from ssmzoo.devices import fit_threads
from ssmzoo.train.corpora import tokenize
from ssmzoo.train.corpora.packed import PackedTokens, load_corpus, packed_loss
from ssmzoo.train.corpora.tokenize import cores
from ssmzoo.train.data import standard_library

END, VOCABULARY = "<|endoftext|>", 8192
LEARNT_FROM, BATCH = 4000, 256  # documents that the tokenizer is trained on, and that are encoded at once
CHANGED = 0.1  # of the words
TURNS, STEPS = 3, 5
PAUSE = 0.2  # seconds between two looks at memory


def documents(seed: int) -> Iterator[str]:
    """Texts without end."""
    draw = random.Random(seed)
    source = "\n".join(path.read_text() for path in standard_library())

    def changed(word: re.Match[str]) -> str:
        return word[0] + (f"_{draw.randrange(10**4)}" if draw.random() < CHANGED else "")

    while True:
        start, length = draw.randrange(len(source)), int(2 ** draw.uniform(6, 14))
        yield re.sub(r"[A-Za-z]{4,}", changed, source[start : start + length])


def write_text(path: Path, size: int) -> None:
    """JSON lines of so many bytes of text."""
    written = 0
    with path.open("w") as file:
        for text in documents(0):
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
            if written >= size:
                return


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer."""
    import tokenizers

    levels = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = levels, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, show_progress=False, special_tokens=[END], initial_alphabet=levels.alphabet()
    )
    tokenizer.train_from_iterator(itertools.islice(documents(1), LEARNT_FROM), trainer)
    tokenizer.save(str(path))


class Memory:
    """The most memory that this process and those that it starts have at once; of what several share, each a part."""

    def __init__(self) -> None:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(PAUSE):
            self.peak = max(self.peak, sum(map(_memory_of, _family(os.getpid()))))


def _family(root: int) -> set[int]:
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


def _memory_of(process: int) -> int:
    """Its proportional set size, in bytes."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def seconds(call: Callable[[], object]) -> float:
    """Of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compared(folder: Path, text: Path, tokenizer: Path, workers: int, size: int) -> float:
    """The speed of ``ssmzoo tokenize`` over that of ``encode_batch`` on the first bytes of the text, in turns."""
    import tokenizers

    alone = tokenizers.Tokenizer.from_file(str(tokenizer))
    lines = list(itertools.takewhile(lambda line: line, text.open().readlines(size)))
    texts = [json.loads(line)["text"] for line in lines]
    # As many files as processes, which are a shard each
    for i in range(workers):
        (folder / f"part{i}.jsonl").write_text("".join(lines[i::workers]))

    def encode() -> None:
        for first in range(0, len(texts), BATCH):
            alone.encode_batch(texts[first : first + BATCH], add_special_tokens=False)

    found = []
    for turn in range(1 + TURNS):
        out, sources = folder / f"turn{turn}", [folder / f"part{i}.jsonl" for i in range(workers)]
        ours = seconds(lambda out=out, sources=sources: tokenize(sources, out, tokenizer, end=END, workers=workers))  # type: ignore[misc]
        theirs = seconds(encode)
        if turn:
            found.append(theirs / ours)
    return statistics.median(found)


def loader_share(corpus: Path, length: int, batch: int) -> float:
    """The processor time of a batch over that of a step forward and backward, of a Mamba of four layers."""
    data = load_corpus(corpus, 0.05, length, None).train
    assert isinstance(data, PackedTokens)
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
    return statistics.median(loads) / statistics.median(steps)


def folder_of(word: str) -> Path:
    """A folder of the command line, which is there."""
    if not Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder; got {word!r:.200}")
    return Path(word)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the corpus in a folder, which is removed in the end, and prints the numbers."""
    parser = argparse.ArgumentParser(prog="python -m ssmzoo.bench.corpora", description=__doc__)
    parser.add_argument("--megabytes", type=counted, default=2000, help="of text")
    parser.add_argument(
        "--compared", type=counted, default=32, help="of these, megabytes that encode_batch is timed on"
    )
    parser.add_argument("--workers", type=counted, default=cores(), help="processes")
    parser.add_argument("--length", type=counted, default=1024, help="tokens of each of a batch's four sequences")
    parser.add_argument("--folder", type=folder_of, help="where files are made; the system's temporary folder if none")
    asked = parser.parse_args(arguments)
    os.environ.setdefault("RAYON_NUM_THREADS", str(asked.workers))
    fit_threads()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        text, tokenizer, corpus = folder / "text.jsonl", folder / "tokenizer.json", folder / "corpus"
        write_tokenizer(tokenizer)
        write_text(text, asked.megabytes * 10**6)
        with Memory() as memory:
            taken = seconds(lambda: tokenize(text, corpus, tokenizer, end=END, workers=asked.workers))
        tokens = ssmzoo.train.corpora.read_manifest(corpus).tokens
        print(f"{asked.megabytes} MB of text: {tokens:,} tokens in {taken:.0f} s on {asked.workers} processes")
        print(f"memory of all processes together: {memory.peak / 1e6:.0f} MB at most", flush=True)
        ratio = compared(folder, text, tokenizer, asked.workers, asked.compared * 10**6)
        print(f"speed of encode_batch alone: {ratio:.2f}", flush=True)
        share = loader_share(corpus, asked.length, 4)
        print(f"loader's share of a step of 4 x {asked.length} tokens: {share:.2%}")


if __name__ == "__main__":
    main(sys.argv[1:])
