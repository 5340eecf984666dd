"""What the compiler may know of the kernels in chunks of the delta rules and of linear attention."""

from __future__ import annotations

from typing import Any, NamedTuple


class Dims(NamedTuple):
    """One constant argument of a kernel, from which the functions that it calls take what they need.

    Attributes:
        H, GROUP: heads of values, and how many of them share one of keys.
        K, V: key and value channels of a head.
        Q: slots of a chunk.
        BLOCK_K, BLOCK_V: channels that a program takes at once.
        FACTOR, PRECISION: the dtype of a product's factors, one of Triton's, and how it is taken.
    """

    H: int
    GROUP: int
    K: int
    V: int
    Q: int
    BLOCK_K: int
    BLOCK_V: int
    FACTOR: Any
    PRECISION: str


class Between(NamedTuple):
    """What passes between the tokens of each chunk, one argument of a kernel; float32, contiguous.

    Attributes:
        first, last: decays from a chunk's start to each token and from each token to its end, (chunks h Q k).
        pairs, erased: as the kernel ``prepare`` says, (chunks h Q Q).
    """

    first: Any
    last: Any
    pairs: Any
    erased: Any
