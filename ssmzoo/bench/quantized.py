"""What fewer bytes a weight bring: matrices times one row beside reading their bytes, and models beside float32."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ssmkernels import native, quantized_linear
from ssmkernels.bench import Contest, Contestant, Measurement, Plan, clock, refusal
from ssmkernels.bench.terms import Results
from ssmkernels.native.calls import Calls
from ssmkernels.native.prepared import Prepared, Program
from ssmzoo.bench import models
from ssmzoo.building import build
from ssmzoo.model import SequenceModel
from ssmzoo.quantized import Rounded, Scheme, to_nearest
from ssmzoo.quantizing import quantize

KIND = "quantization"
OP = "quantized_linear"
DEFAULT = (OP, "mamba-130m")
READING = "reading the weights' bytes once"
WIDE = "float32"

K, O = 768, 3072  # inputs and outputs of a matrix, those of mamba-130m's largest map
BYTES, QUICK_BYTES = 96 * 2**20, 2**23  # of all matrices together: more than caches hold, as a model's are
PARTS = 48  # of a tensor that is read: those of a product of as many outputs

SCHEMES = {"int8": Scheme(8), "int4": Scheme(4, 64, activations="int8")}
# Token by token against at once, as models.SAME: where inputs are rounded to 8 bits, one between two steps takes
# either.
ROUNDED = 1 / 64
DTYPES = {"bfloat16": torch.bfloat16, WIDE: torch.float32}


def bench_quantized(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    """Times products of one row with many matrices, or a model that reads a prompt and decodes.

    In the lines of a model ``limit`` is the time of the same in float32, so that ``of_limit`` says what the weights'
    format brings.
    """
    if plan.device.type != "cpu" or plan.dtype != torch.float32:
        yield [refusal(KIND, name, "ssmzoo", "ours", "weights are compared beside float32 on a CPU", plan)]
    elif name == OP:
        for kind in (*SCHEMES, *DTYPES):
            yield clock(_products(kind, plan), plan)
    else:
        yield from _of_model(name, plan)


def _products(kind: str, plan: Plan) -> Contest:
    """One row times matrix after matrix, and a sum of what they are kept in."""
    total = QUICK_BYTES if plan.quick else BYTES
    torch.manual_seed(0)
    x = torch.randn(1, K, dtype=DTYPES.get(kind, torch.float32))
    matrices = [_matrix(kind)]
    count = max(1, total // sum(t.nbytes for t in matrices[0] if t is not None))
    matrices += [Rounded(*(None if t is None else t.clone() for t in matrices[0])) for _ in range(count - 1)]  # type: ignore[arg-type]
    read = Program([_reading(t) for matrix in matrices for t in matrix if t is not None])
    with torch.no_grad():
        calls = Calls()
        scheme = SCHEMES.get(kind)
        options = {} if scheme is None else {"group_size": scheme.group_size, "activations": scheme.activations}
        for weight, scales, zeros in matrices:
            y = calls.op(quantized_linear, x, weight, scales, zeros, **options)
        program = Program(calls.made)

    def multiply() -> Results:
        program.run()
        return {"y": y}

    def sum_bytes() -> Results:
        read.run()
        return {}

    shape = f"1 row, k {K}, o {O}, {count} matrices"
    players = [Contestant("ssmzoo", "ours", multiply), Contestant(READING, "limit", sum_bytes)]
    return Contest(KIND, OP, f"weights in {kind}", shape, players, limited_by=READING)


def _reading(t: Tensor) -> Prepared:
    """The call that reads a tensor's bytes, on as many threads as a product with it."""
    sums = torch.empty(PARTS, dtype=torch.int64)
    values = {"from": t.data_ptr(), "sums": sums.data_ptr(), "bytes": t.nbytes, "parts": PARTS}
    return Prepared("read", values | {"threads": native.threads(t.nbytes)}, (t,), sums, output="sums")


def _matrix(kind: str) -> Rounded:
    weight = torch.randn(O, K) / K**0.5
    if kind in SCHEMES:
        return to_nearest(weight, SCHEMES[kind])
    return Rounded(weight.to(DTYPES[kind]), None, None)  # type: ignore[arg-type]


def _of_model(name: str, plan: Plan) -> Iterator[list[Measurement]]:
    sizes, overrides = models.sizes_and_overrides(plan, models.SIZES, models.QUICK)
    torch.manual_seed(0)
    wide = build(name, **overrides).eval()
    if wide.config.output not in (None, "tokens") or wide.config.d_input is not None:
        yield [refusal(KIND, name, "ssmzoo", "ours", "only models of tokens are timed", plan)]
        return
    ids = torch.randint(wide.config.padded_vocab_size, (sizes["batch"], sizes["length"]))
    everyone = {}
    for kind in (WIDE, "bfloat16", *SCHEMES):
        plan.say(f"{name}: {kind}")
        model = wide if kind == WIDE else _in(kind, wide)
        dtype, same = DTYPES.get(kind, plan.dtype), ROUNDED if kind == "int4" else models.SAME
        wrong = models._fails(model, ids[:, :8], dataclasses.replace(plan, dtype=dtype), same)
        if wrong:
            yield [refusal(KIND, name, kind, "ours", f"fails its check: {wrong}", plan)]
        else:
            everyone[kind] = model
    shape = f"prompt of {sizes['length']}, {wide.config.n_layers} layers, batch {sizes['batch']}"
    for work in (models.DECODING, models.PREFILL):
        plan.say(f"{name}, {work}")
        players = [
            Contestant(kind, "ours" if kind == WIDE else "yardstick", models.ours(model, ids, work))
            for kind, model in everyone.items()
        ]
        tokens = sizes["batch"] if work == models.DECODING else ids.numel()
        rows = clock(Contest(KIND, name, work, shape, players, tokens=tokens), plan)
        limit = next((row.median for row in rows if row.implementation == WIDE), None)
        yield [_over(row, limit) for row in rows]


def _in(kind: str, model: SequenceModel) -> SequenceModel:
    own = copy.deepcopy(model)
    return own.to(DTYPES[kind]) if kind in DTYPES else quantize(own, kind)


def _over(row: Measurement, limit: float | None) -> Measurement:
    if row.median is None or limit is None:
        return row
    return dataclasses.replace(row, limit=limit, limited_by=f"the same in {WIDE}", of_limit=row.median / limit)
