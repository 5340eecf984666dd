"""One call that puts our kernels under the models of transformers, and takes them away again."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections import Counter
from collections.abc import Iterable
from types import ModuleType, TracebackType

from torch import nn

from ssmkernels.core.names import unknown
from ssmzoo.integrations.transformers.functions import supplied
from ssmzoo.integrations.transformers.imports import forget_imports, loaded, watch_imports
from ssmzoo.integrations.transformers.linears import put_over_maps, replace_forward, restore_forward
from ssmzoo.integrations.transformers.lookups import installed, installed_families, lookups_of, published
from ssmzoo.integrations.transformers.methods import MAPS, METHODS, methods, methods_of
from ssmzoo.screen import printable

ALL = "*"  # the family that stands for all of them

_in_use: Counter[str] = Counter()  # how many accelerations ask for each family
_changing = threading.RLock()  # held while a module is given what _in_use says


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one function or method of a family.

    Attributes:
        family: transformers' name of it, its folder in ``transformers.models``.
        function: what transformers looks up, or the method that was replaced.
        runs: what runs in its place.
        why: what speaks against ours, such as a method that somebody has put there; empty where ours runs.
    """

    family: str
    function: str
    runs: str
    why: str = ""


class Acceleration:
    """What :func:`accelerate` did. Prints as a table; ends with :meth:`restore`, or with a ``with`` block.

    Attributes:
        families: the families that it asked for.
    """

    def __init__(self, families: Iterable[str], asked: str | None = None):
        self.families = sorted(families)
        self._asked = self.families if asked is None else [asked]
        self._active = True
        with _changing:
            _in_use.update(self._asked)
            watch_imports(_refresh)
            _refresh_all()

    @property
    def rows(self) -> list[Row]:
        """What runs, a :class:`Row` for each function that transformers looks up and each method that is replaced."""
        return [row for family in self.families for row in _rows(family)]

    def restore(self) -> None:
        """Puts everything back as it was, for models that exist and for those to come. Further calls do nothing.

        Where several accelerations ask for a family, it stays fast until the last of them ends.
        """
        with _changing:
            if not self._active:
                return
            self._active = False
            _in_use.subtract(self._asked)
            _refresh_all()
            if not +_in_use:
                forget_imports()

    def __enter__(self) -> Acceleration:
        if not self._active:
            raise RuntimeError("accelerate: this acceleration was restored before its `with` block; make another")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        columns = ("family", "function", "runs", "why not ours")
        lines = [columns, *map(dataclasses.astuple, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def __repr__(self) -> str:
        rows, state = self.rows, "" if self._active else ", restored"
        ours = sum(not row.why for row in rows)
        return f"<Acceleration of {len(self.families)} families: {ours} of {len(rows)} functions are ours{state}>"


def accelerate(model_or_family: nn.Module | str | Iterable[str] | None = None) -> Acceleration:
    """Runs transformers' state-space models, and other families whose functions we have, on our kernels.

    transformers looks for functions of the packages mamba_ssm, causal_conv1d and fla, and runs slow PyTorch code in
    their place where they are missing, as on a CPU. This gives it ours. Models that exist already become fast as well
    as those to come, in training and in ``generate``; weights, outputs and everything else stay as they are. A
    function of a package that is installed is left alone. ::

        print(accelerate())                # everything, until the program ends
        with accelerate("mamba2"):         # one family, for some lines
            ...

    Beside speed, sequences packed with ``seq_idx`` train on a CPU, where transformers refuses them without the
    packages, and several tokens after a cached prefix continue from its state in Mamba's family, where transformers
    starts from zero.

    A graph that ``torch.compile`` made before keeps what it captured: compile afterwards, or call
    ``torch.compiler.reset()``.

    Args:
        model_or_family: a model of transformers, whose families are accelerated for all models; or the name of a
            family, such as ``"jamba"``, or several; all if None.

    Returns:
        What runs now, which prints as a table; its ``restore()`` undoes it, as does the end of a ``with`` block.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: ``model_or_family`` is of another kind, or nothing that can be accelerated.
    """
    known = known_families()
    if model_or_family is None:
        return Acceleration(known, asked=ALL)
    if isinstance(model_or_family, nn.Module):
        found = _families_in(model_or_family, known)
        if not found:
            kind = type(model_or_family).__name__
            raise ValueError(
                f"accelerate: `model_or_family`, a {kind}, has no layer that we have functions for; "
                f"these families do: {', '.join(known)}"
            )
        return Acceleration(found)
    if not isinstance(model_or_family, Iterable):
        kind = type(model_or_family).__name__
        raise TypeError(f"accelerate: `model_or_family` must be a model, a family's name, or several; got a {kind}")
    families = [model_or_family] if isinstance(model_or_family, str) else list(model_or_family)
    if not families:
        raise ValueError("accelerate: `model_or_family` must name at least one family, or be None for all; got none")
    for family in families:
        if not isinstance(family, str):
            told = printable(repr(family))
            raise TypeError(f"accelerate: names in `model_or_family` must be of type str; got {told}")
        if family not in known:
            raise ValueError(f"accelerate: `model_or_family`: {unknown('family', family, known)}")
    return Acceleration(set(families))


def known_families() -> list[str]:
    """Those that can be accelerated, of which older versions of transformers lack some."""
    return sorted({*published(), *METHODS} & installed_families().keys())


def _families_in(model: nn.Module, known: Iterable[str]) -> set[str]:
    """The families whose code the model's layers run."""
    modules = {base.__module__ for layer in model.modules() for base in type(layer).__mro__}
    found = (re.match(r"transformers\.models\.(\w+)\.", module) for module in modules)
    return {match[1] for match in found if match} & set(known)


def _rows(family: str) -> list[Row]:
    rows, functions = [], published().get(family, [])
    of_heads = any(function == "mamba_chunk_scan_combined" for function, _ in functions)
    for function, package in functions:
        ours = supplied(package, function, of_heads)
        if installed(package):
            rows.append(Row(family, function, package, f"{package} is installed"))
        elif ours is None:
            rows.append(Row(family, function, "transformers' own", "ssmkernels has no such function"))
        else:
            rows.append(Row(family, function, ours.runs))
    stays = _stays(family)
    for method in (*methods(family), MAPS):
        why = stays.get(method.name, "")
        rows.append(Row(family, method.name, "somebody else's" if why else method.runs, why))
    return rows


def _stays(family: str) -> dict[str, str]:
    """The methods in whose place somebody else's runs, and whose it is."""
    modules = [module for name, module in loaded() if name == family]
    found = {there.method.name: there.stays for module in modules for there in methods_of(family, module)}
    return {**found, MAPS.name: put_over_maps()}


def _refresh_all() -> None:
    replace_forward() if +_in_use else restore_forward()
    for family, module in loaded():
        _refresh(family, module)


def _refresh(family: str, module: ModuleType) -> None:
    """Gives a module of transformers our functions if an acceleration asks for its family, else its own."""
    with _changing:
        wanted = _in_use[family] > 0 or (_in_use[ALL] > 0 and family in known_families())
        for lookup in lookups_of(module):
            ours = supplied(lookup.package, lookup.function)
            if wanted and ours is not None:
                lookup.supply(ours.over(lookup.own["torch_function"]))
            else:
                lookup.restore()
        for method in methods_of(family, module):
            method.replace() if wanted else method.restore()
