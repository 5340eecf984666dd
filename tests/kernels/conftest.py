"""What the tests of the ops share, as fixtures."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from torch import Tensor

from ssmkernels.core import external, triton_support


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    """Implementations are chosen as on a machine where nobody has set anything."""
    monkeypatch.delenv("SSMZOO_IMPLEMENTATION", raising=False)
    monkeypatch.delenv("SSMZOO_DISABLE", raising=False)


@pytest.fixture
def randn() -> Callable[..., Tensor]:
    """``randn(2, 3, dtype=...)``: normal random numbers, the same in every run, float64 unless told."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(*shape, generator=generator, dtype=wide).to(dtype)

    return draw


def _run(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {
        name: a.detach().requires_grad_(a.is_floating_point() or a.is_complex()) if isinstance(a, Tensor) else a
        for name, a in arguments.items()
    }
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {name: a for name, a in leaves.items() if isinstance(a, Tensor) and a.requires_grad}
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.complex128 if o.is_complex() else torch.float64)
        for o in outputs
    ]
    cotangents = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    empty = outputs[0].numel() == 0  # then, and only then, an input may be without influence
    gradients = torch.autograd.grad(
        outputs, list(wanted.values()), cotangents, allow_unused=empty, materialize_grads=empty
    )
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}


@pytest.fixture
def run() -> Callable[..., dict[str, Tensor]]:
    """``run(function, **arguments)``: all outputs, and all gradients of one random projection of the outputs.

    Every floating-point argument must have a gradient. Two functions with the same outputs get the same
    projection.
    """
    return lambda function, /, **arguments: _run(function, arguments)


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """``assert_same(found, expected)``: the same outputs and gradients, to a few roundings of their dtype."""

    def check(found: dict[str, Tensor], expected: dict[str, Tensor], roundings: float = 64) -> None:
        assert found.keys() == expected.keys()
        for name, e in expected.items():
            f = found[name]
            assert f.dtype == e.dtype, f"{name}: {f.dtype}, not {e.dtype}"
            assert f.shape == e.shape, f"{name}: {tuple(f.shape)}, not {tuple(e.shape)}"
            scale = max(1.0, float(e.abs().max())) if e.numel() else 1.0
            error = float((f - e).abs().max()) if e.numel() else 0.0
            allowed = roundings * torch.finfo(e.dtype).eps * scale
            assert error <= allowed, f"{name}: off by {error:.3g}, at most {allowed:.3g} allowed"

    return check


@pytest.fixture
def assert_repeats() -> Callable[..., None]:
    """``assert_repeats(function, **arguments)``: a second call gives the same bits, of outputs and gradients."""

    def check(function: Callable[..., Any], /, **arguments: Any) -> None:
        first, second = _run(function, arguments), _run(function, arguments)
        assert all(torch.equal(first[name], second[name]) for name in first)

    return check


@pytest.fixture
def assert_in_budget() -> Callable[..., None]:
    """``assert_in_budget(function, reference, **arguments)``: nearly as close to the truth as the reference.

    The truth is the reference in float64 on the same inputs. The error may be at most twice the
    reference's in the inputs' dtype, plus a few roundings; for every output and every gradient.
    """

    def check(function: Callable[..., Any], reference: Callable[..., Any], /, **arguments: Any) -> None:
        truth = _run(reference, {name: _double(a) for name, a in arguments.items()})
        rounded, found = _run(reference, arguments), _run(function, arguments)
        for name, t in truth.items():
            assert found[name].dtype == rounded[name].dtype, name
            eps = torch.finfo(found[name].dtype).eps
            band = 4 * eps * float(t.abs().max()) if t.numel() else 0.0
            allowed = 2 * _error(rounded[name], t) + band
            error = _error(found[name], t)
            assert error <= allowed, f"{name}: off by {error:.3g}, at most {allowed:.3g} allowed"

    return check


def _double(a: Any) -> Any:
    if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()):
        return a.to(torch.complex128 if a.is_complex() else torch.float64)
    return a


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.to(truth.dtype) - truth).abs().max()) if truth.numel() else 0.0


@pytest.fixture
def assert_compiles(assert_same) -> Callable[..., None]:
    """``assert_compiles(function, **arguments)``: one graph, and the eager outputs and gradients."""

    def check(function: Callable[..., Any], /, **arguments: Any) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert_same(_run(compiled, arguments), _run(function, arguments))

    return check


@pytest.fixture
def opcheck() -> Callable[..., None]:
    """``opcheck(operator, arguments)``: PyTorch's own checks of an operator's schema, fake kernel and
    autograd."""

    def check(operator: Any, arguments: dict[str, Any]) -> None:
        leaves = {
            name: a.detach().requires_grad_(a.is_floating_point() or a.is_complex()) if isinstance(a, Tensor) else a
            for name, a in arguments.items()
        }
        torch.library.opcheck(operator, (), leaves)

    return check


def noncontiguous(x: Tensor) -> Tensor:
    """The same values with no stride of 1, and what no call may read in between."""
    spread = torch.full((*(2 * size for size in x.shape),), torch.nan, dtype=x.dtype)
    view = spread[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


@pytest.fixture
def spread() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """``spread(arguments)``: the floating-point tensors among them with no stride of 1."""

    def apply(arguments: dict[str, Any]) -> dict[str, Any]:
        floating = (k for k, a in arguments.items() if isinstance(a, Tensor) and a.dtype != torch.int32)
        return arguments | {k: noncontiguous(arguments[k]) for k in floating}

    return apply


@pytest.fixture
def on_threads():
    """Calls a function on so many threads; the number before comes back at the end."""
    before = torch.get_num_threads()

    def call(number, function, *args, **kwargs):
        torch.set_num_threads(number)
        return function(*args, **kwargs)

    yield call
    torch.set_num_threads(before)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, and CPU tensors were on it, for what asks ``ssmkernels.core.external``."""
    triton_support.missing()  # remembers the truth
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(external, "wrong_device", lambda a: None)
    external._missing.cache_clear()
    yield
    external._missing.cache_clear()


@pytest.fixture
def stand_in() -> Callable[..., types.ModuleType]:
    """``stand_in(name, **functions)``: a module of that name that has these."""

    def made(name: str, **functions: Callable[..., Any]) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        module.__dict__.update(functions)
        return module

    return made


@pytest.fixture(scope="session")
def _interpreter() -> Iterator[Forks]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SSMZOO_")}
    with Forks(Path(__file__).with_name("interpreter.py"), environment) as forks:
        yield forks


@pytest.fixture
def interpret(_interpreter: Forks, tmp_path: Path) -> Callable[..., str]:
    """``interpret(program, *arguments)``: what Python code prints in a process where Triton interprets its kernels."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")

    def call(program: str, *arguments: str) -> str:
        source = tmp_path / "program.py"
        source.write_text(program)
        done = _interpreter.run(source, *arguments)
        assert done.status == 0, f"exit status {done.status}\n{done.out}{done.err}"
        return done.out

    return call
