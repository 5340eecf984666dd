"""Stream a long text through a state, in chunks: memory stays that of one chunk however long the text is.

    python examples/stream_text.py runs/demo --bytes 1000000

The model is any on bytes, by name (then it is untrained: about 8 bits per byte) or by the folder of a
trained one.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ssmzoo


def chunks(paths: list[Path], length: int, limit: int) -> Iterator[Tensor]:
    """The bytes of the files as ids (1, length), one chunk after another, ``limit`` in all."""
    read = itertools.islice(itertools.chain.from_iterable(path.read_bytes() for path in paths), limit)
    while piece := list(itertools.islice(read, length)):
        yield torch.tensor(piece)[None]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="lstm-tiny")
    parser.add_argument("--bytes", type=int, default=65536)
    parser.add_argument("--chunk", type=int, default=2048)
    options = parser.parse_args()
    for name, least in (("bytes", 2), ("chunk", 1)):  # the first byte has none before it that tells of it
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}; got {getattr(options, name)}")

    torch.manual_seed(0)
    try:
        model = ssmzoo.build(options.model).eval()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    state = model.initial_state(1)
    nats, seen, last = 0.0, 0, None
    for ids in chunks(sorted(Path(argparse.__file__).parent.glob("*.py")), options.chunk, options.bytes):
        logits, state = model(ids, state)
        if last is not None:  # the last logits of a chunk predict the first byte of the next
            nats += F.cross_entropy(last, ids[:, 0]).item()
        nats += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        last, seen = logits[:, -1], seen + ids.shape[1]
        if seen % (8 * options.chunk) == 0 or seen == options.bytes or ids.shape[1] < options.chunk:
            bits = nats / (seen - 1) / math.log(2)
            print(f"{seen:>9} bytes: {bits:.3f} bits per byte, state {state.nbytes} bytes")


if __name__ == "__main__":
    main()
