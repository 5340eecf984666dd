"""Every op called in every way of :mod:`ssmkernels.check.ways`, in a process that may crash.

    python -m ssmkernels.check.matrix        # prints what is neither right nor refused

``ssmzoo verify --matrix`` shows the whole as a table.
"""

from __future__ import annotations

import faulthandler
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ssmkernels.core.forcing import use
from ssmkernels.core.names import OPS

# Those of the table in the documentation, by their headings
TABLE = {
    "compile": "compile",
    "export": "export",
    "vmap": "vmap",
    "jvp": "jvp",
    "double_backward": "double backward",
    "fake": "fake tensors",
    "dtensor": "DTensor",
    "autocast": "autocast",
    "inference_mode": "inference mode",
    "deepcopy": "deepcopy",
    "pickle": "pickle",
    "fork": "fork",
    "threads": "threads",
}
OTHERS = ("meta", "wrapped", "zero", "forced", "grad", "gradients", "traced")
WAYS = (*TABLE, *OTHERS)
RIGHT = "✓"
FAULT = "✗ "  # begins what is neither right nor refused
REFERENCE = 'with `use("reference")`'
PATIENCE = 120  # seconds for one call of all


class Cell(NamedTuple):
    """What became of one op called in one way: ``RIGHT``, a reason why it does not go, or a ``FAULT``."""

    op: str
    way: str
    verdict: str


def cells(ops: Sequence[str] | None = None, ways: Sequence[str] = WAYS) -> Iterator[Cell]:
    """Makes the calls, in processes of their own: after one that ends its process, another makes the rest."""
    left = [(op, way) for op in ops or sorted(OPS) for way in ways]
    while left:
        command = [sys.executable, "-m", "ssmkernels.check.matrix", json.dumps(left)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                cell = Cell(*json.loads(line))
                left.remove((cell.op, cell.way))
                yield cell
        if left:
            yield Cell(*left.pop(0), f"{FAULT}ends its process with {process.returncode}, or hangs")


def try_all(calls: Sequence[tuple[str, str]]) -> Iterator[Cell]:
    """Makes the calls in this process."""
    import torch

    from ssmkernels.check.spec import spec_of
    from ssmkernels.check.ways import Calls

    torch.set_num_threads(1)
    made: dict[str, Calls] = {}
    for op, way in calls:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        if op not in made:
            made[op] = Calls(op, spec_of(op))
        yield Cell(op, way, verdict(made[op], way))
    faulthandler.cancel_dump_traceback_later()


def verdict(calls: object, way: str, forced: bool = False) -> str:
    """What becomes of a call; where its error says so, of one by the reference, which is ``forced`` then."""
    from ssmkernels.check.ways import Refused

    try:
        return RIGHT if getattr(calls, way)() else f"{FAULT}another result"
    except Refused as refusal:
        return str(refusal)
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if 'use("reference")' in told and not forced:  # then that must do it
        with use("reference"):
            return REFERENCE if verdict(calls, way, forced=True) == RIGHT else f"{FAULT}{told}"
    return FAULT + told


def main() -> None:
    warnings.simplefilter("ignore")
    if len(sys.argv) > 1:
        for cell in try_all(json.loads(sys.argv[1])):
            print(json.dumps(cell), flush=True)
        return
    faults = [cell for cell in cells() if cell.verdict.startswith(FAULT)]
    for cell in faults:
        print(f"{cell.op}, {cell.way}: {cell.verdict}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
