"""Every ValueError and TypeError says what it is about: an argument, an option, a key, a variable or a path."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"`[^`\s]+`|(?<!\w)--[a-z]|SSMZOO_[A-Z]|MALLOC_")

# What a message may put in: what a caller of the function was told to call the argument, or a path.
NAMES = {"where", "origin", "argument", "unable"}
PATHS = {"path", "folder", "source", "index", "run", "given"}

# Those that are not about an argument, by the start of their text.
OTHERS = {
    "nothing was timed": "the result of a benchmark, not its arguments",
    "{checksums.SUMS} is missing": "a reason, which the error about the folder puts in",
    "{STATE} is of step": "a reason, as above",
    "it differs from its checksum": "a reason, as above",
    "{str(error)}": "passes on another message",
    "{elsewhere}": "passes on another process's message",
    "Context: the arguments of process": "another process names them",
}


def message(node: ast.expr) -> str:
    """The text of a message; what is put in stands in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else message(part)
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return message(node.left) + message(node.right)
    return f"{{{ast.unparse(node)}}}"


def refusals() -> Iterator[tuple[str, str]]:
    """(place, message) of every refusal in the packages."""
    for folder in (ROOT / "ssmzoo", ROOT / "kernels" / "ssmkernels"):
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                error = node.exc if isinstance(node, ast.Raise) else None
                if isinstance(error, ast.Call) and ast.unparse(error.func) in ("ValueError", "TypeError", "_Refused"):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", message(error.args[0])


def names_something(text: str) -> bool:
    if NAME.search(text) or text.startswith(tuple(OTHERS)):
        return True
    if re.search(r"\bunknown\(", text):  # unknown("dtype", "float12", ...): names the argument, and what there is
        return True
    put_in = re.findall(r"\{([^{}]*)\}", text)
    return any(re.split(r"\W", value)[0] in NAMES | PATHS for value in put_in)


def test_every_refusal_names_what_it_refuses():
    found = list(refusals())
    assert len(found) > 250
    nameless = [f"{place}: {text}" for place, text in found if not names_something(text)]
    assert not nameless, "\n".join(nameless)


def test_the_exceptions_are_still_there():
    for start in OTHERS:
        assert any(text.startswith(start) for _, text in refusals()), start
