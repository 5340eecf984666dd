"""How processors are arranged: which of them share data, weights, sequences and heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ssmkernels.core.names import unknown
from ssmzoo.config import ModelConfig

NAMES = ("data", "shard", "context", "tensor")  # the outermost first: neighbours share what they exchange most of


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Processors in each dimension.

    Attributes:
        data: copies of the weights, each with sequences of its own (DDP).
        shard: over which weights, gradients and optimiser are cut, each with sequences of its own (FSDP).
        context: over which sequences are cut.
        tensor: over which heads and channels are cut.
    """

    data: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in NAMES:
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"Mesh: `{name}` must be a positive int; got {size!r}")

    @property
    def size(self) -> int:
        return self.data * self.shard * self.context * self.tensor

    @property
    def batches(self) -> int:
        """Parts that a step's sequences are dealt out to."""
        return self.data * self.shard

    def span(self, name: str) -> int:
        """Over how many neighbours a group of this dimension reaches."""
        inner = NAMES[NAMES.index(name) :]
        span = 1
        for each in inner:
            span *= getattr(self, each)
        return span

    def __str__(self) -> str:
        sizes = [f"{name}={getattr(self, name)}" for name in NAMES if getattr(self, name) > 1]
        return ",".join(sizes) or "data=1"


def parse_mesh(text: str) -> Mesh:
    """``"data=2,shard=4"``.

    Raises:
        ValueError: another form, a dimension that there is not, or no positive number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (word.strip() for word in part.partition("="))
        if name not in NAMES:
            raise ValueError(unknown("dimension of --mesh", name, NAMES))
        if not equals or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(f"--mesh must be as data=2,shard=4, each size once and at least 1; got {text!r:.100}")
        sizes[name] = int(size)
    return Mesh(**sizes)


def meshes(config: ModelConfig, processors: int, node: int, length: int, batch: int | None) -> Iterator[Mesh]:
    """Those that are worth a look: heads and channels are cut within a node, and every part has tokens.

    Args:
        processors: in all.
        node: of them in a node.
        length: tokens of a sequence.
        batch: sequences of a step, which every mesh has to deal out evenly; None for one a part.
    """
    for tensor in _divisors(processors):
        if tensor > node or config.d_model % tensor:
            continue
        for context in _divisors(processors // tensor):
            if context > 1 and length // context < LEAST_TOKENS:
                continue
            rest = processors // tensor // context
            for shard in _divisors(rest):
                mesh = Mesh(rest // shard, shard, context, tensor)
                if batch is None or batch % mesh.batches == 0:
                    yield mesh


LEAST_TOKENS = 64  # of a part, below which the kernels' chunks are not full


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
