"""What the docstrings of all ops say alike, added to those that leave it out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

_ARGUMENTS = {
    "cu_seqlens": "int32 ``(s + 1)``, borders of sequences packed one after another in a batch of one.",
    "implementation": "force one by name; the fastest that can run this call if None.",
}
_STATES = "Sums and states are kept in float32 (float64 for float64 input), whatever the input's dtype."
_RAISES = "\n\nRaises:\n    TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, by name.\n"


def completed(doc: str | None, parameters: Iterable[str]) -> str | None:
    """A docstring with an entry for each of the parameters that mean the same in every op, and with a section Raises.

    Ops with states say under Returns in which dtype these are.

    What it says of them itself stays.
    """
    if doc is None:
        return None
    doc, parameters = inspect.cleandoc(doc), list(parameters)
    for name in parameters:
        if name in _ARGUMENTS and f"\n    {name}: " not in doc:
            arguments, heading, rest = doc.partition("\n\nReturns:")
            doc = f"{arguments}\n    {name}: {_ARGUMENTS[name]}{heading}{rest}"
    if "return_final_state" in parameters and "float64 for float64 input" not in doc:
        before, heading, rest = doc.partition("\n\nReturns:")
        returns, gap, rest = rest.partition("\n\n")
        doc = f"{before}{heading}{returns}\n    {_STATES}{gap}{rest}"
    return doc if "\nRaises:" in doc else doc + _RAISES
