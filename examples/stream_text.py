"""Stream a long text through a state, in chunks: memory stays that of one chunk however long the text is.

    python examples/stream_text.py runs/demo --bytes 1000000

The model is any on bytes, by name (then it is untrained: about 8 bits per byte) or by the folder of a
trained one.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ssmzoo


def chunks(paths: list[Path], length: int, limit: int) -> Iterator[Tensor]:
    """The bytes of the files as ids (1, length), one chunk after another, ``limit`` in all."""
    pending = b""
    for path in paths:
        pending += path.read_bytes()
        while len(pending) >= length and limit > 0:
            piece, pending = pending[: min(length, limit)], pending[length:]
            limit -= len(piece)
            yield torch.tensor(list(piece))[None]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="lstm-tiny")
    parser.add_argument("--bytes", type=int, default=65536)
    parser.add_argument("--chunk", type=int, default=2048)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = ssmzoo.build(options.model).eval()
    state = model.initial_state(1)
    nats, seen, last = 0.0, 0, None
    for ids in chunks(sorted(Path(argparse.__file__).parent.glob("*.py")), options.chunk, options.bytes):
        logits, state = model(ids, state)
        if last is not None:  # the last logits of a chunk predict the first byte of the next
            nats += F.cross_entropy(last, ids[:, 0]).item()
        nats += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        last, seen = logits[:, -1], seen + ids.shape[1]
        if seen % (8 * options.chunk) == 0 or seen == options.bytes:
            bits = nats / (seen - 1) / math.log(2)
            print(f"{seen:>9} bytes: {bits:.3f} bits per byte, state {state.nbytes} bytes")


if __name__ == "__main__":
    main()
