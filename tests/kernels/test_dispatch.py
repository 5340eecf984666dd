from __future__ import annotations

import inspect
import itertools
import linecache
import pathlib
import sys
import threading
import types
import warnings

import pytest
import torch
from torch import Tensor

import ssmkernels
from ssmkernels import OPS, explain, selective_scan, use
from ssmkernels.core import dispatch
from ssmkernels.core.declare import op
from ssmkernels.core.dispatch import Op

PACKAGE = pathlib.Path(ssmkernels.__file__).parent
serial = itertools.count()  # operators cannot be registered twice in a process


@pytest.fixture
def toy(monkeypatch):
    """A new op whose implementations can be told apart: quick gives x + 1, steady x + 2, the reference x + 3.

    quick takes no odd length and is slow beyond 10, steady runs where ``toy.lacks`` is None.
    """
    name = f"toy{next(serial)}"
    package = types.ModuleType(f"package_of_{name}")
    modules = {n: types.ModuleType(f"{package.__name__}.{n}") for n in ("quick", "steady", "reference")}

    for step, module in enumerate(modules.values(), 1):
        module.compute = lambda a, step=step: a.x + step
    modules["quick"].unsupported = lambda a: "an odd length" if a.x.shape[0] % 2 else None
    modules["quick"].slow = lambda a: "a long way" if a.x.shape[0] > 10 else None
    modules["steady"].missing = lambda: toy.lacks
    for module in (package, *modules.values()):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def toy(x: Tensor, *, implementation: str | None = None) -> Tensor:
        """x and a number more."""

    toy.__name__, toy.__module__ = name, package.__name__
    toy = op(shapes="x: l", returns="y: l", implementations=tuple(modules))(toy)
    setattr(package, name, toy)
    toy.name, toy.lacks = name, None
    yield toy
    del OPS[name]


EVEN, ODD = torch.zeros(2), torch.zeros(3)
QUICK, STEADY, REFERENCE = 1, 2, 3


def ran(toy, x=EVEN, **options):
    return int(toy(x, **options)[0])


def test_the_first_that_can_run_is_taken(toy):
    assert ran(toy) == QUICK
    assert ran(toy, ODD) == STEADY
    toy.lacks = "no such machine"
    assert ran(toy, ODD) == REFERENCE


def test_one_that_is_slow_at_a_call_is_passed_over(toy):
    far = torch.zeros(12)
    assert ran(toy, far) == STEADY
    found = explain(toy, far)
    assert found.chosen == "steady"
    assert found.able == ("quick", "steady", "reference")
    assert found.reasons == {"quick": "a long way", "reference": "slower than 'steady'"}
    assert ran(toy, far, implementation="quick") == QUICK
    toy.lacks = "no such machine"
    assert ran(toy, far) == QUICK  # still better than the reference
    assert explain(toy, far).chosen == "quick"


def test_the_argument_forces(toy):
    assert [ran(toy, implementation=name) for name in ("quick", "steady", "reference")] == [1, 2, 3]


def test_use(toy):
    with use("reference"):
        assert ran(toy) == REFERENCE
    with use(**{toy.name: "steady"}):
        assert ran(toy) == STEADY
        assert ran(toy, implementation="quick") == QUICK
    assert ran(toy) == QUICK


def test_use_in_use(toy):
    with use(**{toy.name: "steady"}):
        with use("reference"):
            assert ran(toy) == REFERENCE
        with use(selective_scan="tiled"):
            assert ran(toy) == STEADY
        assert ran(toy) == STEADY
    with use("reference", **{toy.name: "steady"}):
        assert ran(toy) == STEADY


def test_use_ends_with_an_exception(toy):
    with pytest.raises(KeyError), use("reference"):
        raise KeyError
    assert ran(toy) == QUICK


def test_use_reaches_other_threads(toy):
    found = []
    with use("reference"):
        thread = threading.Thread(target=lambda: found.append(ran(toy)))
        thread.start()
        thread.join()
    assert found == [REFERENCE]


def test_use_leaves_ops_alone_that_have_no_such_implementation(toy):
    with use("tiled"):
        assert ran(toy) == QUICK


def check_variable(toy, monkeypatch, name, chosen):
    """The variable's values, one after another, lead to these implementations."""
    for value, implementation in chosen.items():
        monkeypatch.setenv(name, value)
        assert ran(toy) == implementation


def test_the_environment(toy, monkeypatch):
    chosen = {"steady": STEADY, f"reference, {toy.name}=steady": STEADY, "selective_scan=tiled": QUICK}
    check_variable(toy, monkeypatch, "SSMZOO_IMPLEMENTATION", chosen)
    monkeypatch.setenv("SSMZOO_IMPLEMENTATION", "steady")
    with use("reference"):
        assert ran(toy) == REFERENCE
    assert ran(toy, implementation="quick") == QUICK


def test_disable(toy, monkeypatch):
    left = {"quick": STEADY, f"quick:{toy.name},steady": REFERENCE, "tiled:selective_scan": QUICK}
    check_variable(toy, monkeypatch, "SSMZOO_DISABLE", left)
    monkeypatch.setenv("SSMZOO_DISABLE", "quick")
    with pytest.raises(ValueError, match=r"'quick' .* cannot run this call: disabled by SSMZOO_DISABLE"):
        toy(EVEN, implementation="quick")


@pytest.mark.parametrize(
    ("variable", "value", "match"),
    [
        ("SSMZOO_IMPLEMENTATION", "quik", "SSMZOO_IMPLEMENTATION: unknown implementation: 'quik'.*'quick'"),
        ("SSMZOO_IMPLEMENTATION", "selectiv_scan=tiled", "unknown op: 'selectiv_scan'.*'selective_scan'"),
        ("SSMZOO_IMPLEMENTATION", "selective_scan=fft", "unknown implementation of selective_scan: 'fft'"),
        ("SSMZOO_DISABLE", "quik", "SSMZOO_DISABLE: unknown implementation: 'quik'"),
        ("SSMZOO_DISABLE", "reference", "the reference cannot be disabled"),
    ],
)
def test_errors_in_the_environment(variable, value, match, toy, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=match):
        toy(EVEN)


def test_unknown_names(toy):
    with pytest.raises(ValueError, match=rf"unknown implementation of {toy.name}: 'qick'. Did you mean 'quick'"):
        toy(EVEN, implementation="qick")
    with pytest.raises(ValueError, match=r"unknown implementation of .* There are: quick, reference, steady"):
        toy(EVEN, implementation="zzz")
    with (
        pytest.raises(ValueError, match=r"ssmkernels.use: unknown implementation: 'refrence'. .*'reference'"),
        use("refrence"),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"ssmkernels.use: unknown op: 'selektive_scan'"),
        use(selektive_scan="tiled"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="unknown implementation of fft_conv: 'tiled'"),
        use(fft_conv="tiled"),
    ):
        pass


def test_forced_but_impossible_says_why(toy, monkeypatch):
    toy.lacks = "no such machine"
    with pytest.raises(ValueError, match=r"'quick' \(by the argument `implementation`\) cannot run .*: an odd length"):
        toy(ODD, implementation="quick")
    with (
        pytest.raises(ValueError, match=r"'steady' \(by ssmkernels.use\) cannot run this call: no such machine"),
        use("steady"),
    ):
        toy(EVEN)
    monkeypatch.setenv("SSMZOO_IMPLEMENTATION", "steady")
    with pytest.raises(ValueError, match=r"'steady' \(by SSMZOO_IMPLEMENTATION\) cannot run this call"):
        toy(EVEN)


def test_a_large_call_on_the_reference_warns_once(toy, monkeypatch):
    monkeypatch.setattr(dispatch, "LARGE_CALL", 3)
    toy.lacks = "no such machine"
    with pytest.warns(RuntimeWarning, match="quick: an odd length; steady: no such machine") as caught:
        toy(ODD)
    assert caught[0].filename == __file__
    assert linecache.getline(__file__, caught[0].lineno).strip() == "toy(ODD)"  # the caller of the op
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy(ODD)


def test_no_warning_without_a_reason(toy, monkeypatch):
    monkeypatch.setattr(dispatch, "LARGE_CALL", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy(torch.zeros(4))  # quick runs
        toy.lacks = "no such machine"
        toy(torch.zeros(1))  # small
        toy(ODD, implementation="reference")
        with use("reference"):
            toy(ODD)


def test_explain(toy):
    toy.lacks = "no such machine"
    for named in (toy, toy.name):
        found = explain(named, ODD)
        assert found.chosen == "reference"
        assert found.reasons == {"quick": "an odd length", "steady": "no such machine"}
    assert str(explain(toy, ODD)).splitlines() == [
        f"{toy.name}: reference runs (the fastest that can run this call)",
        "  not quick: an odd length",
        "  not steady: no such machine",
    ]
    assert explain(toy, EVEN).reasons == {"steady": "no such machine", "reference": "slower than 'quick'"}


def test_explain_where_one_is_forced(toy):
    found = explain(toy, ODD, implementation="steady")
    assert found.chosen == "steady"
    assert found.reasons["quick"] == "an odd length"
    assert found.reasons["reference"] == "'steady' is forced by the argument `implementation`"
    with use("quick"):
        assert "but it cannot: an odd length" in str(explain(toy, ODD))


def test_explain_runs_nothing(toy, monkeypatch):
    monkeypatch.setattr(Op, "_run", lambda *_: pytest.fail("it ran"))
    explain(toy, EVEN)
    u, A = torch.zeros(1, 2, 3), torch.zeros(3, 2, dtype=torch.complex64)
    B = torch.zeros(1, 2, 2)
    assert explain(selective_scan, u, u, A, B, B).reasons["tiled"] == "complex A"


def test_explain_errors(toy):
    with pytest.raises(TypeError, match="`x` must be a tensor"):
        explain(toy, 1)
    with pytest.raises(ValueError, match=r"unknown op: 'selectivescan'. Did you mean 'selective_scan"):
        explain("selectivescan")
    with pytest.raises(TypeError, match="`op` must be an op of ssmkernels"):
        explain(torch.add, EVEN, EVEN)
    assert ran(toy) == QUICK  # no trace of it is left


def test_explain_leaves_other_threads_alone(toy):
    found = []

    def slow_to_explain(x):
        thread = threading.Thread(target=lambda: found.append(ran(toy)))
        thread.start()
        thread.join()
        return toy(x)

    assert explain(slow_to_explain, EVEN).chosen == "quick"
    assert found == [QUICK]


def test_autocast_stays_outside(toy, monkeypatch):
    monkeypatch.setattr(sys.modules[f"package_of_{toy.name}.quick"], "compute", lambda a: (a.x[:, None] * a.x) @ a.x)
    with torch.autocast("cpu", torch.bfloat16):
        assert toy(torch.ones(2)).dtype == torch.float32
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16


def test_the_first_call_may_be_a_compilers(toy):
    torch._dynamo.reset()
    compiled = torch.compile(toy, fullgraph=True, backend="eager")
    assert int(compiled(EVEN)[0]) == QUICK


def test_a_compiled_function_follows_use(toy):
    torch._dynamo.reset()
    compiled = torch.compile(toy, fullgraph=True, backend="eager")
    assert int(compiled(EVEN)[0]) == QUICK
    with use("reference"):
        assert int(compiled(EVEN)[0]) == REFERENCE
    assert int(compiled(EVEN)[0]) == QUICK


def test_a_compiled_function_under_autocast(toy):
    torch._dynamo.reset()
    compiled = torch.compile(toy, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert int(compiled(EVEN)[0]) == QUICK


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in PACKAGE.glob("ops/*/reference.py")))
def test_every_folder_exports_its_functions(folder):
    package = sys.modules[f"ssmkernels.ops.{folder}"]
    assert folder in package.__all__
    ops = [name for name in package.__all__ if name in OPS]
    assert ops
    for name in package.__all__:
        assert getattr(ssmkernels, name) is getattr(package, name)
        assert name in ssmkernels.__all__
        assert getattr(package, name).__doc__
    for name in ops:
        parameter = inspect.signature(getattr(package, name)).parameters["implementation"]
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert OPS[name].package == f"ssmkernels.ops.{folder}"
        assert OPS[name].names[-1] == "reference"


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_implementation_loads(op):
    for name in OPS[op].names:
        assert callable(OPS[op].implementation(name).function)
        assert isinstance(OPS[op].why_not(name), str)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_signs_that_pytorch_puts_off(implementation):
    if OPS["causal_conv1d"].why_not(implementation):
        pytest.skip(f"needs {implementation}: {OPS['causal_conv1d'].why_not(implementation)}")
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    weight = torch.randn(3, 4)
    found = ssmkernels.causal_conv1d(x, weight, implementation=implementation)
    assert torch.equal(found, ssmkernels.causal_conv1d(x.resolve_neg(), weight, implementation=implementation))
