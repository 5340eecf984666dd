"""Text of any size to make a corpus of, and a tokenizer for it.

Documents are stretches of the Python standard library's source, from some dozens of characters to 16 Ki, in each of
which some words get other endings, so that no two are alike. The tokenizer is trained on a few of them.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from ssmzoo.train.data import standard_library

END, VOCABULARY = "<|endoftext|>", 8192
CHANGED = 0.1  # of the words


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


def write_tokenizer(path: Path, learnt_from: int) -> None:
    """A byte-level BPE tokenizer, trained on so many documents."""
    import tokenizers

    levels = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = levels, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, show_progress=False, special_tokens=[END], initial_alphabet=levels.alphabet()
    )
    tokenizer.train_from_iterator(itertools.islice(documents(1), learnt_from), trainer)
    tokenizer.save(str(path))
