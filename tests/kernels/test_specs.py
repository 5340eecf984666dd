"""What follows from the specs alone: a new op, case or implementation is tested here with no further code."""

from __future__ import annotations

import contextlib
import functools
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ssmkernels import OPS, explain
from ssmkernels.check.running import is_real_or_complex, run, with_gradients
from ssmkernels.check.spec import Draw, specs, tensors_of
from ssmkernels.testing import check

SPECS = specs()
pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [(op, name) for op in sorted(OPS) for name in OPS[op].names]
EVERY = pytest.mark.parametrize(("op", "implementation"), PAIRS, ids=map("-".join, PAIRS))
DIFFERENTIABLE = [op for op in SPECS if SPECS[op].differentiable]


def need(op, implementation):
    """Skips a test of what this machine lacks."""
    why = OPS[op].why_not(implementation)
    if why:
        pytest.skip(f"{op}: {implementation}: {why}")


def has_gradients(op, implementation):
    """Whether it has them in the op's base case: what serves decoding alone may have none."""
    spec = SPECS[op]
    arguments = spec.inputs(spec.case({}), torch.float32, "cpu", 0)
    return spec.differentiable and implementation in explain(spec.function(), **with_gradients(arguments)).able


def test_every_op_has_a_spec():
    assert sorted(SPECS) == sorted(OPS)


@pytest.mark.parametrize("op", SPECS)
def test_a_spec_is_whole(op):
    spec = SPECS[op]
    cases = spec.cases()
    assert len({str(case) for case in cases}) == len(cases), "a case stands there twice"
    for case in (*cases, spec.case(spec.bench)):
        assert spec.flops(case) >= 0
    assert spec.flops(spec.case(spec.bench)) > 0
    assert spec.bytes(spec.case({}), torch.bfloat16) < spec.bytes(spec.case({}), torch.float32)
    returned = tensors_of(spec.function()(**spec.inputs(spec.case({}), torch.float32, "cpu", 0)))
    assert len(returned) <= len(spec.results)
    layouts = {case["layout"] for case in cases}
    batched = spec.declared.per_sequence(spec.make(spec.case({}), Draw(0)))
    assert layouts == {"contiguous", "strided", *(["far"] if batched else [])}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_case(op, implementation, dtype):
    """In the dtypes that few kernels have branches for, every third case; the reference, which has none and which the
    others are compared with in every dtype, only the base case in others than float32."""
    need(op, implementation)
    rows = [SPECS[op].row(case) for case in SPECS[op].cases()]
    few = rows[:1] if implementation == "reference" else rows[::3]
    whole = dtype == torch.float32 or (dtype == torch.bfloat16 and implementation != "reference")
    report = check(op, implementation, cases=rows if whole else few, dtypes=[dtype], quick=True)
    assert report.checks, "no case reaches this implementation"


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck_of_the_reference(op):
    spec = SPECS[op]
    arguments = spec.inputs(spec.case({}), torch.float64, "cpu", 0)
    names = [name for name, value in arguments.items() if is_real_or_complex(value)]

    def reference(*values):
        return spec.function()(**{**arguments, **dict(zip(names, values, strict=True))}, implementation="reference")

    leaves = with_gradients(arguments)
    assert torch.autograd.gradcheck(reference, [leaves[name] for name in names], fast_mode=True, atol=1e-6)


def longer(spec):
    """A row that changes what differs from call to call: the length, or a single token's batch."""
    names = {"l", "m", "length", "shape"}
    for row in spec.rows:
        if len(row) == 1 and row.keys() <= names and all(value not in (0, 1) for value in row.values()):
            return row
    base = spec.case({})
    assert "b" in base, f"{spec.op} has no row for another length"
    return {"b": base["b"] + 1}


def compiled_is_eager(op, implementation, rows, **options):
    torch._dynamo.reset()
    spec, gradients = SPECS[op], has_gradients(op, implementation)
    eager = functools.partial(spec.function(), implementation=implementation)
    compiled = torch.compile(lambda **a: eager(**a), fullgraph=True, **options)
    for row in rows:
        arguments = spec.inputs(spec.case(row), torch.float32, "cpu", 0)
        again = spec.inputs(spec.case(row), torch.float32, "cpu", 0)
        expected = run(spec, eager, again, gradients=gradients, poison=False)
        found = run(spec, compiled, arguments, gradients=gradients, poison=False)
        assert found.tensors.keys() == expected.tensors.keys()
        for name, value in expected.tensors.items():
            torch.testing.assert_close(found.tensors[name], value, msg=lambda m, name=name: f"{name}: {m}")


def chosen_here(op):
    return next(name for name in OPS[op].names if not OPS[op].why_not(name))


OTHERS = [(op, implementation) for op, implementation in PAIRS if implementation != chosen_here(op)]


@pytest.mark.parametrize(("op", "implementation"), OTHERS, ids=map("-".join, OTHERS))
def test_compiled_is_eager(op, implementation):
    """One graph, with its gradients. What the compiler then does with the operators, ``test_opcheck`` asks of each.

    The implementation that runs here is compiled by the next test, and at fixed sizes in the mixers that call it.
    """
    need(op, implementation)
    compiled_is_eager(op, implementation, [{}], backend="eager")


@pytest.mark.parametrize("op", sorted(OPS))
def test_compiled_for_any_sizes_is_eager(op):
    """With the implementation that runs here, and as far as to operators, forward and backward."""
    compiled_is_eager(op, chosen_here(op), [{}, longer(SPECS[op])], backend="aot_eager", dynamic=True)


@EVERY
def test_autocast_does_not_reach_in(op, implementation):
    need(op, implementation)
    spec, gradients = SPECS[op], has_gradients(op, implementation)

    def under_autocast(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return spec.function()(**arguments, implementation=implementation)

    def results(function):
        return run(spec, function, spec.inputs(spec.case({}), torch.float32, "cpu", 0), gradients=gradients).tensors

    outside, inside = results(implementation), results(under_autocast)
    for name, expected in outside.items():
        assert inside[name].dtype == expected.dtype, name
        assert torch.equal(inside[name], expected), name


class PassOn(TorchFunctionMode):
    """A mode above PyTorch's operators."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Remembers one call of each of our operators, and whether it had gradients."""

    def __init__(self):
        super().__init__()
        self.calls = {}
        self.gradients = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ssmkernels":
            self.calls.setdefault(func.name(), (func, args, self.gradients))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def recorded():
    """One call of each operator that the cases reach, forward and backward, as under a compiler."""
    recorder = Recorder()
    # When it first traces, the compiler remembers its own functions: that must not be the one put in place of them here
    torch.compile(torch.neg, backend="eager", fullgraph=True)(torch.zeros(1))
    with pytest.MonkeyPatch.context() as patch, recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # then ops go through their operators
        for op, implementation in PAIRS:
            if OPS[op].why_not(implementation):
                continue
            rows = SPECS[op].rows
            recorder.gradients = has_gradients(op, implementation)
            for row in ({}, rows[0], *[row for row in rows if row.get("packed")][:1]):
                try:
                    arguments = SPECS[op].inputs(SPECS[op].case(row), torch.float32, "cpu", 0)
                    run(SPECS[op], implementation, arguments, gradients=recorder.gradients)
                except ValueError as error:
                    assert "cannot run this call" in str(error)  # noqa: PT017 (what cannot run is no failure)
    return recorder.calls


def registered():
    """Our operators, by what implementation of which op they are called; tests register some of their own."""
    for op, implementation in PAIRS:
        OPS[op].implementation(implementation)
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ssmkernels::"))
    return sorted(name for name in names if not name.startswith(("ssmkernels::test_", "ssmkernels::toy")))


REGISTERED = registered()


def has_own_backward(op, implementation):
    """Whether it is a kernel with another one for its gradients."""
    name = f"{op}_{implementation}"
    if not {f"ssmkernels::{name}", f"ssmkernels::{name}_backward"} <= {*REGISTERED}:
        return False
    return getattr(torch.ops.ssmkernels, name).default._schema.arguments[-1].name == "save"


WITH_BACKWARD = [pair for pair in PAIRS if has_own_backward(*pair)]


@pytest.mark.parametrize(("op", "implementation"), WITH_BACKWARD, ids=map("-".join, WITH_BACKWARD))
def test_eager_calls_pass_by_the_operators_unless_somebody_watches_with_the_same_bits(op, implementation):
    need(op, implementation)
    spec = SPECS[op]
    nodes = []

    def noted(**arguments):
        returned = spec.function()(**arguments, implementation=implementation)
        nodes.append(type(tensors_of(returned)[0].grad_fn).__name__)
        return returned

    def results(watch):
        with watch:
            return run(spec, noted, spec.inputs(spec.case({}), torch.float32, "cpu", 0)).tensors

    alone, recorder = results(contextlib.nullcontext()), Recorder()
    watched, passed = results(recorder), results(PassOn())
    operator = f"ssmkernels::{op}_{implementation}"
    assert nodes[0] == f"{operator}Backward"
    assert {operator, f"{operator}_backward"} <= recorder.calls.keys()
    assert nodes[1] == nodes[2] == f"GeneratedBackwardFor_ssmkernels_{op}_{implementation}_defaultBackward"
    for name, expected in alone.items():
        assert torch.equal(watched[name], expected), name
        assert torch.equal(passed[name], expected), name


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, recorded):
    lacking = [implementation for op, implementation in PAIRS if OPS[op].why_not(implementation)]
    if name not in recorded and any(f"_{word}_" in f"{name}_" for word in lacking):
        pytest.skip("needs what its implementation needs")
    operator, args, gradients = recorded[name]
    wanted = gradients and not name.endswith("_backward") and not operator._schema.is_mutable
    leaf = lambda a: a.detach().requires_grad_(wanted) if is_real_or_complex(a) else a  # noqa: E731
    torch.library.opcheck(operator, tree_map(leaf, args))
