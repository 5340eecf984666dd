"""In how many bits a map's weights are kept, and which maps of a model are."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from ssmkernels.core.names import unknown
from ssmkernels.ops.quantized_linear import SPAN
from ssmzoo.options import check_options, convert
from ssmzoo.plain import short

BLOCK = 32  # inputs whose 4-bit weights are packed together


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weights of a map are kept.

    Attributes:
        bits: 8 (from −127 to 127 times a scale), or 4 (from 0 to 15 less a zero, times a scale).
        group_size: inputs of an output that share a scale and a zero, a multiple of 32; all of them if None.
        input_scale: whether inputs are multiplied by a scale each, whose inverse is part of the weights.
        activations: "int8" rounds what a map in 4 bits is given, as :func:`ssmkernels.quantized_linear` says; None
            takes it as it is.
    """

    bits: int
    group_size: int | None = None
    input_scale: bool = False
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"quantisation: `bits` must be 4 or 8; got {short(self.bits)}")
        size = self.group_size
        if size is not None and (size < BLOCK or size % BLOCK):
            raise ValueError(f"quantisation: `group_size` must be a multiple of {BLOCK}; got {short(size)}")
        if size is not None and size >= 2**31:
            raise ValueError(f"quantisation: `group_size` must be less than 2**31; got {short(size)}")
        if self.activations is None:
            return
        if self.activations != "int8":
            raise ValueError(f"quantisation: `activations` must be None or 'int8'; got {short(self.activations)}")
        if self.bits == 8:
            raise ValueError("quantisation: `activations` must be None beside weights in 8 bits; got 'int8'")
        if size is not None and size % min(size, SPAN):
            raise ValueError(
                f"quantisation: `group_size` must be at most {SPAN} or a multiple of it beside int8 `activations`; "
                f"got {short(size)}"
            )

    def groups(self, inputs: int) -> int:
        """How many there are for so many inputs."""
        return 1 if self.group_size is None else -(-inputs // self.group_size)

    def columns(self, inputs: int) -> int:
        """Bytes of an output's weights."""
        return inputs if self.bits == 8 else -(-inputs // BLOCK) * (BLOCK // 2)


# Embeddings and heads have smaller groups: every token's logits depend on all of a head, and calibration leaves it out.
_END = {"bits": 4, "group_size": 32, "activations": "int8"}
SCHEMES: dict[str, dict[str, dict[str, Any]]] = {
    "int8": {"*": {"bits": 8}},
    "int4": {"embedding": _END, "lm_head": _END, "*": {"bits": 4, "group_size": 64, "activations": "int8"}},
}


def schemes_of(
    given: str | Mapping[str, Any], group_size: int | None = None, activations: str | None = None
) -> dict[str, dict[str, Any]]:
    """What a config keeps under ``quantization``: patterns of maps' names → the options of their scheme.

    Args:
        given: the name of one of :data:`SCHEMES`, or patterns → "int8", "int4" or a scheme's options.
        group_size: of maps in 4 bits; their scheme's own if None.
        activations: of maps in 4 bits, "int8" or "float"; their scheme's own if None.

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
    if activations not in (None, "int8", "float"):
        raise ValueError(f"quantisation: `activations` must be None, 'int8' or 'float'; got {short(activations)}")
    own: dict[str, Any] = {} if group_size is None else {"group_size": group_size}
    if activations is not None:
        own["activations"] = None if activations == "float" else activations
    if own and not any(options.get("bits") == 4 for options in found.values()):
        name, value = ("group_size", group_size) if group_size is not None else ("activations", activations)
        raise ValueError(f"quantisation: `{name}` is of maps in 4 bits, and none is; got {value}")
    found = {p: options | (own if options.get("bits") == 4 else {}) for p, options in found.items()}
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
