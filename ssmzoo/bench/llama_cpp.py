"""Contests of a model with llama.cpp: the same weights from one GGUF file, in 32, 8 and 4 bits, on as many threads."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmkernels.bench import Contest, Contestant, Measurement, Plan, clock, refusal
from ssmkernels.bench.peers import ABSENT
from ssmkernels.bench.terms import Results, Role
from ssmzoo.bench.models import DECODING, PREFILL, QUICK, QUICK_LAYERS, ROOM, SIZES, ours
from ssmzoo.building import build
from ssmzoo.model import SequenceModel
from ssmzoo.pretrained import save
from ssmzoo.quantizing import quantize

KIND = "llama.cpp"
DEFAULT = ("mamba-130m",)
TURN, TURNS = 0.4, 8  # seconds: llama.cpp's threads go on looking for work for some milliseconds after each call
BATCH = 512  # tokens that llama.cpp reads at once, which is its default

# Kind of numbers in the file → our scheme with as many bits, and how far rounding may take logits from each other.
KINDS: dict[str, tuple[dict[str, Any] | None, float]] = {
    "f32": (None, 1e-3),
    "q8_0": ({"scheme": "int8"}, 0.1),
    "q4_0": ({"scheme": "int4", "group_size": 32}, 0.5),
}


def bench_llama_cpp(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times reading a prompt and writing one more token, in each kind of numbers.

    ``plan.changes`` may hold the length; everything else in it overrides the model's config.
    """
    if plan.device.type != "cpu" or plan.dtype != torch.float32:
        yield [refusal(KIND, name, "ssmzoo", "ours", "timed on a CPU in float32 alone", plan)]
        return
    missing = missing_package()
    if missing is not None:
        yield [refusal(KIND, name, KIND, "peer", f"{ABSENT}: pip install {missing}", plan)]
        return
    changes = dict(plan.changes)
    length = changes.pop("length", (QUICK if plan.quick else SIZES)["length"])
    if plan.quick:
        changes.setdefault("n_layers", QUICK_LAYERS)
    torch.manual_seed(0)
    model = build(name, **changes).eval()
    ids = torch.randint(model.config.padded_vocab_size, (1, length))
    with tempfile.TemporaryDirectory() as folder:
        for kind, (scheme, _) in KINDS.items():
            plan.say(f"{name}, {kind}: writing the file")
            path = Path(folder) / f"{kind}.gguf"
            save(model, path, "gguf", dtype=kind)
            mine = model if scheme is None else quantize(copy.deepcopy(model), **scheme)
            for work in (PREFILL, DECODING):
                plan.say(f"{name}, {kind}, {work}: comparing")
                yield _timed(name, mine, _theirs(path, ids, work), kind, work, ids, plan)
            path.unlink()


def missing_package() -> str | None:
    """What has to be installed first, if anything."""
    needed = {"gguf": "gguf", "llama_cpp": "llama-cpp-python"}
    return next((package for module, package in needed.items() if importlib.util.find_spec(module) is None), None)


def _timed(
    name: str, model: SequenceModel, theirs: Callable[[], Results], kind: str, work: str, ids: Tensor, plan: Plan
) -> list[Measurement]:
    """The lines of one kind of work, if both give the same logits but for rounding."""
    mine = ours(model, ids, work)
    expected, found = mine()["logits"][0, -1].float(), theirs()["logits"][0, -1]
    off = float((found - expected).norm() / expected.norm())
    if off > KINDS[kind][1]:
        return [refusal(KIND, name, KIND, "peer", f"its logits in {kind} are off by {off:.2g} of ours", plan)]
    # Who rounds weights in another way has other results, of which no more can be asked than this.
    role: Role = "peer" if kind == "f32" else "yardstick"
    others = Contestant(KIND, role, theirs, "" if kind == "f32" else f"{kind}: rounds in another way")
    shape = f"prompt of {ids.shape[1]}, {model.config.n_layers} layers, {kind}"
    tokens = ids.numel() if work == PREFILL else 1
    if work == DECODING and not plan.quick:
        plan = dataclasses.replace(plan, shortest=TURN, seconds=max(plan.seconds, TURN * TURNS))
    return clock(
        Contest(KIND, name, f"{work}, {kind}", shape, [Contestant("ssmzoo", "ours", mine), others], tokens=tokens), plan
    )


def _theirs(path: Path, ids: Tensor, work: str) -> Callable[[], Results]:
    import llama_cpp

    threads, prompt = torch.get_num_threads(), ids[0].tolist()
    model = llama_cpp.Llama(
        str(path),
        n_ctx=len(prompt) + ROOM,
        n_batch=BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def last() -> Results:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
        return {"logits": torch.from_numpy(logits.copy()).view(1, 1, -1)}

    def read() -> Results:
        model.reset()
        model.eval(prompt)
        return last()

    if work != DECODING:
        return read
    read()

    def decode() -> Results:
        if model.n_tokens >= len(prompt) + ROOM - 1:
            read()
        model.eval(prompt[-1:])
        return last()

    return decode
