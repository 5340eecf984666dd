"""A whole benchmark: which contests, in which order, and what remains of one that was stopped."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ssmkernels.bench import Measurement, Plan, bench_op, refusal
from ssmkernels.bench.contest import first_line
from ssmkernels.check.spec import spec_of, specs
from ssmkernels.core.names import unknown

USUAL = ("ops", "mixers", "models")
KINDS = (*USUAL, "scaling", "busy", "quantization", "engine", "context", "corpora", "transformers", "llama.cpp")
ONE_OF = {
    "ops": "op",
    "mixers": "mixer",
    "models": "model",
    "scaling": "op or mixer",
    "busy": "op, mixer or model",
    "quantization": "op or model",
    "engine": "model",
    "context": "layer or long context",
    "corpora": "text",
    "transformers": "family of transformers",
    "llama.cpp": "model",
}
MADE_BY = {  # kind → module of this package, and its function of a name and a plan
    "mixers": ("mixers", "bench_mixer"),
    "models": ("models", "bench_model"),
    "scaling": ("scaling", "bench_scaling"),
    "busy": ("busy", "bench_busy"),
    "quantization": ("quantized", "bench_quantized"),
    "engine": ("engine", "bench_engine"),
    "context": ("context", "bench_context"),
    "corpora": ("corpora", "bench_corpora"),
    "transformers": ("families", "bench_family"),
    "llama.cpp": ("llama_cpp", "bench_llama_cpp"),
}


def names_of(kind: str) -> list[str]:
    """Everything of a kind that can be timed."""
    if kind == "ops":
        return list(specs())
    if kind == "mixers":
        from ssmzoo.bench.mixers import candidates

        return candidates()
    if kind == "scaling":
        from ssmzoo.bench.scaling import scalable

        return scalable()
    if kind == "busy":
        return list(dict.fromkeys(name for each in USUAL for name in names_of(each)))
    if kind == "context":
        from ssmzoo.bench.context import DEFAULT

        return list(DEFAULT)
    if kind == "corpora":
        from ssmzoo.bench.corpora import DEFAULT as TEXTS

        return list(TEXTS)
    if kind == "transformers":
        from ssmzoo.bench.families import FAMILIES

        return list(FAMILIES)
    if kind == "quantization":
        from ssmzoo.bench.quantized import OP

        return [OP, *names_of("models")]
    from ssmzoo.config import list_models

    return list_models()


def chosen(kinds: Sequence[str], only: Sequence[str]) -> dict[str, list[str]]:
    """Kind → the names to time: those in ``only``, or the usual ones.

    Raises:
        ValueError: a name that no kind has; says which there are and the nearest.
    """
    from ssmzoo.bench import busy, engine, llama_cpp, models, quantized, scaling

    usual = {
        "models": models.DEFAULT,
        "scaling": scaling.DEFAULT,
        "busy": busy.DEFAULT,
        "quantization": quantized.DEFAULT,
        "engine": engine.DEFAULT,
        "llama.cpp": llama_cpp.DEFAULT,
    }
    known = {kind: names_of(kind) for kind in kinds}
    every = sorted({name for names in known.values() for name in names})
    for name in only:
        if name not in every:
            raise ValueError(unknown(ONE_OF[kinds[0]] if len(kinds) == 1 else "name", name, every))
    if only:
        found = {kind: [name for name in dict.fromkeys(only) if name in names] for kind, names in known.items()}
        return {kind: names for kind, names in found.items() if names}
    return {kind: list(usual.get(kind, names)) for kind, names in known.items()}


def check_changes(kind: str, names: Iterable[str], changes: Mapping[str, Any]) -> None:
    """Whether ``--set`` names sizes and options that something has. What a model knows, its config tells.

    Raises:
        ValueError: a name that nothing has, or a value of another type.
    """
    of_models = ("models", "quantization", "engine", "llama.cpp")
    if kind in of_models or (kind == "busy" and not set(names) <= {*specs(), *names_of("mixers")}):
        return
    known: dict[str, Any] = {}
    if kind in ("ops", "scaling", "busy"):
        for name in set(names) & set(specs()):
            known |= spec_of(name).case({})
    if kind in ("mixers", "scaling", "busy"):
        from ssmzoo.bench.mixers import SIZES
        from ssmzoo.registry import list_mixers

        options = {name: list_mixers()[name].options for name in names if name in list_mixers()}
        known |= SIZES if options else {}
        known |= {f"{name}.{key}": None for name, found in options.items() for key in found}
    if kind == "context":
        from ssmzoo.bench.context import SIZES as CONTEXT_SIZES

        known |= CONTEXT_SIZES
    if kind == "corpora":
        from ssmzoo.bench.corpora import SIZES as CORPUS_SIZES

        known |= CORPUS_SIZES
    if kind == "transformers":
        from ssmzoo.bench.families import SIZES as FAMILY_SIZES

        known |= FAMILY_SIZES
    for key, value in changes.items():
        if key not in known:
            raise ValueError("--set: " + unknown(f"size or option of {kind}", key, known))
        if isinstance(known[key], int) and type(value) is not type(known[key]):
            raise ValueError(f"--set {key}: expected {type(known[key]).__name__}, such as {known[key]}; got {value!r}")


def run(kind: str, names: Sequence[str], plan: Plan, done: Callable[[], None]) -> Iterator[list[Measurement]]:
    """The contests of each name in turn; ``done`` is called after each name. Nothing that goes wrong stops the rest."""
    for name in names:
        try:
            yield from _bench(kind)(name, plan)
        except Exception as error:  # sizes that do not fit, too little memory, or whatever else a kernel raises
            told = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            yield [refusal(kind, name, "ssmzoo", "ours", told, plan)]
        done()


def _bench(kind: str) -> Callable[[str, Plan], Iterator[list[Measurement]]]:
    if kind == "ops":
        return bench_op
    module, function = MADE_BY[kind]
    found: Callable[[str, Plan], Iterator[list[Measurement]]] = getattr(
        importlib.import_module(f"ssmzoo.bench.{module}"), function
    )
    return found
