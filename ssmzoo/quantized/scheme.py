"""In how many bits a map's weights are kept, and which maps of a model are."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from ssmkernels.core.names import unknown
from ssmzoo.options import check_options, convert
from ssmzoo.plain import short

BLOCK = 32  # inputs whose 4-bit weights are packed together


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of a map are kept.

    Attributes:
        bits: 8 (from −127 to 127 times a scale), or 4 (from 0 to 15 less a zero, times a scale).
        group_size: inputs of an output that share a scale and a zero, a multiple of 32; all of them if None.
    """

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"quantisation: `bits` must be 4 or 8; got {short(self.bits)}")
        size = self.group_size
        if size is not None and (size < BLOCK or size % BLOCK):
            raise ValueError(f"quantisation: `group_size` must be a multiple of {BLOCK}; got {short(size)}")
        if size is not None and size >= 2**31:
            raise ValueError(f"quantisation: `group_size` must be less than 2**31; got {short(size)}")

    def groups(self, inputs: int) -> int:
        """How many there are for so many inputs."""
        return 1 if self.group_size is None else -(-inputs // self.group_size)

    def columns(self, inputs: int) -> int:
        """Bytes of an output's weights."""
        return inputs if self.bits == 8 else -(-inputs // BLOCK) * (BLOCK // 2)


# Embeddings and heads stay in 8 bits beside maps in 4, as every token's logits depend on all of a head.
SCHEMES: dict[str, dict[str, dict[str, Any]]] = {
    "int8": {"*": {"bits": 8}},
    "int4": {"embedding": {"bits": 8}, "lm_head": {"bits": 8}, "*": {"bits": 4, "group_size": 64}},
}


def schemes_of(given: str | Mapping[str, Any], group_size: int | None = None) -> dict[str, dict[str, Any]]:
    """What a config keeps under ``quantization``: patterns of maps' names → the options of their scheme.

    Args:
        given: the name of one of :data:`SCHEMES`, or patterns → "int8", "int4" or a scheme's options.
        group_size: of maps in 4 bits; their scheme's own if None.

    Raises:
        ValueError, TypeError: an unknown name or option, or a value that does not fit, by its name.
    """
    if isinstance(given, str):
        if given not in SCHEMES:
            raise ValueError(unknown("scheme of quantisation", given, SCHEMES))
        found = SCHEMES[given]
    elif isinstance(given, Mapping):
        found = {
            convert("each pattern of quantisation", pattern, str): dict(_options(pattern, options))
            for pattern, options in given.items()
        }
    else:
        raise TypeError(f"quantisation: `scheme` must be a scheme's name or a mapping; got {type(given).__name__}")
    if not found:
        raise ValueError("quantisation: `scheme` must name at least one pattern of maps; got {}")
    if group_size is not None:
        if not any(options["bits"] == 4 for options in found.values()):
            raise ValueError(f"quantisation: `group_size` is of maps in 4 bits, and none is; got {group_size}")
        found = {
            p: options | ({"group_size": group_size} if options["bits"] == 4 else {}) for p, options in found.items()
        }
    for options in found.values():
        scheme_from(options)
    return {pattern: dict(options) for pattern, options in found.items()}


def scheme_from(options: Mapping[str, Any]) -> Scheme:
    """A scheme by its options.

    Raises:
        ValueError, TypeError: an unknown or missing option, or a value that does not fit, by its name.
    """
    if "bits" not in options:
        raise ValueError(f"quantisation: each scheme must have `bits`, 4 or 8; got {short(dict(options))}")
    return Scheme(**check_options("quantisation", Scheme, options))


def scheme_for(name: str, schemes: Mapping[str, Mapping[str, Any]]) -> Scheme | None:
    """The scheme of the first pattern that a map's name matches; None where none does."""
    for pattern, options in schemes.items():
        if fnmatch.fnmatchcase(name, pattern):
            return scheme_from(options)
    return None


def _options(pattern: str, given: Any) -> Mapping[str, Any]:
    if isinstance(given, str):
        if given not in SCHEMES:
            raise ValueError(unknown(f"scheme of quantisation for {pattern!r:.80}", given, SCHEMES))
        return SCHEMES[given]["*"]
    options: Mapping[str, Any] = convert(f"the scheme of {pattern!r:.80}", given, dict)
    return options
