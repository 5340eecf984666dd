"""The native library: built, found, refused with a reason, and clean under the sanitizers."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmkernels import native
from ssmkernels.native import build, sources

# The library at another place, and what it says.
ELSEWHERE = """
import pathlib, sys
from ssmkernels import native
native.PATH = pathlib.Path(sys.argv[1])
"""

# Odd sizes of everything, so that a step beyond any array is a step beyond its memory.
EXERCISE = (
    ELSEWHERE
    + """
import torch
from ssmkernels import explain
from ssmkernels.check.running import run, with_gradients
from ssmkernels.check.spec import spec_of
from ssmkernels.ops.selected_attention import selection
from ssmkernels.testing import check
assert native.missing() is None, native.missing()
torch.set_num_threads(3)
native.SMALL = 0  # multiply-adds from which several threads share a call
odd = dict(b=1, l=67, d=37, n=7)
scans = [odd, dict(g=3), dict(fixed="BC"), dict(b=1, packed=True, l=21), dict(l=0), dict(n=17)]
scans += [dict(complex=True, **odd), dict(complex=True, fixed="C"), dict(complex=True, packed=True, b=1, l=21, g=2)]
steps = [dict(d=37, n=7), dict(n=17), dict(n=17, complex=True), dict(n=1, complex=True)]
convolutions = [dict(w=4, d=37, l=67), dict(w=4, d=129, l=67, b=1), dict(w=4, d=64, l=2, b=1), dict(w=7)]
convolutions += [dict(w=3, b=1, packed=True, l=21), dict(l=0)]
duals = [dict(b=1, l=67, h=3, p=7, n=5, g=1), dict(h=6, p=17, n=9, g=3, chunk=16, D="hp"), dict(l=0)]
duals += [dict(b=1, packed=True, l=150, h=5, p=1, n=1, g=1)]
recurrences = [dict(l=9, d=261), dict(b=1, packed=True, l=21, fixed=True), dict(l=0), dict(log=True, weights="float32")]
recurrences += [dict(complex=True, decay="complex", d=133, log=True)]
rotated = [dict(b=1, l=21, h=3, p=7, n=5, g=1, a=2, chunk=16), dict(l=9, r=3, p=17, n=9, a=3, interleaved=False)]
rotated += [dict(b=1, packed=True, l=21, r=2), dict(l=0), dict(a=0, l=3)]
deltas = [dict(b=1, l=67, h=3, g=1, k=7, v=5), dict(l=9, h=5, g=1, k=17, v=9, decay="k"), dict(l=0)]
deltas += [dict(b=1, packed=True, l=150, h=2, g=1, k=1, v=1, decay="")]
attentions = [dict(b=1, l=67, h=3, g=1, k=7, v=5), dict(l=9, h=4, k=17, v=9, decay="token", bonus=True), dict(l=0)]
attentions += [dict(b=1, packed=True, l=150, h=2, g=1, k=1, v=1, decay="head")]
rules = [dict(b=1, l=70, h=3, k=7, v=5), dict(k=17, v=33), dict(b=1, packed=True, l=150, h=2, k=1, v=1), dict(l=0)]
cases_of = {
    "delta_rule": deltas,
    "delta_rule_step": [dict(h=3, g=1, k=7, v=5), dict(k=17, v=33, decay="k")],
    "gated_deltanet_step": [dict(m=37, h=3, g=1, k=17, v=70), dict(b=1, m=1, h=1, g=1, k=1, v=1, w=1)],
    "selective_scan": scans,
    "selective_scan_step": steps,
    "ssd": duals,
    "ssd_step": [dict(h=3, p=7, n=5, g=1), dict(p=33, n=17, D="hp")],
    "mamba3_scan": rotated,
    "mamba3_scan_step": [dict(h=3, p=7, n=5, g=1), dict(p=33, n=17, a=5, r=3, interleaved=False)],
    "mlstm": [dict(b=1, l=67, h=9, k=7, v=5), dict(b=1, packed=True, l=150, k=1, v=1), dict(l=0), dict(k=33, v=17)],
    "slstm": [dict(b=9, l=17, h=2, p=5), dict(b=1, packed=True, l=40, p=17, h=1), dict(l=0), dict(p=1, state=False)],
    "slstm_step": [dict(b=9, p=5), dict(p=33, h=2)],
    "mlstm_step": [dict(h=9, k=7, v=5), dict(k=33, v=17)],
    "linear_attention": attentions,
    "linear_attention_step": [dict(h=3, g=1, k=7, v=5), dict(k=17, v=33, decay="token", bonus=True)],
    "generalized_delta_rule": rules,
    "generalized_delta_rule_step": [dict(h=3, k=7, v=5), dict(k=33, v=17)],
    "linear_recurrence": recurrences,
    "linear_recurrence_step": [dict(d=261), dict(complex=True, decay="complex", d=133, log=True)],
    "causal_conv1d": convolutions,
    "causal_conv1d_step": [dict(w=4, d=37), dict(w=1)],
    "mamba2_step": [dict(m=37, p=17, n=9, mlp=5), dict(b=1, m=1, h=1, p=1, n=1, g=1, w=1, norm=False, biases=False)],
    "mamba_step": [dict(b=3, m=37, d=67, n=17, r=5), dict(b=1, d=1, m=1, n=1, w=1, r=1, norm_eps=1e-5, biases=False)],
    "fft_conv": [dict(l=180, l_k=180, d=9, gate=True), dict(b=1, l=400, l_k=5, l_r=3, d=1), dict(b=1, packed=True)],
    "quantized_linear": [
        dict(o=67),
        dict(l=9, k=33, o=5, activations="int8"),
        dict(bits="8", zeros=False, group_size=None, k=131),
    ],
    "rglru_gates": [dict(l=20, h=2, p=37), dict(b=1, p=1, first=False), dict(l=0)],
    "rms_norm": [dict(shape=(5, 37)), dict(shape=(3, 7, 12), before=False, group_size=3), dict(shape=(1, 1))],
    "swiglu": [dict(shape=(5, 37)), dict(shape=(300, 33), scale=-1.5), dict(shape=(1, 1))],
    "diagonal_kernel": [dict(length=67, n=7), dict(length=257, complex=False), dict(discretization="dss")],
    "dplr_kernel": [dict(length=67, n=7, rank=2), dict(length=127, n=3, complex=False), dict(length=1, d=1, n=1)],
    "attention": [dict(l=300, m=330, h=3, h_kv=1, k=5, v=9, window=(70, 3)), dict(h=1, h_kv=1, k=1, l=1)],
    "selected_attention": [dict(l=70, k=9, v=5, n=3, block_size=16), dict(l=300, b=1, h=1, h_kv=1, g=1, k=1, n=3)],
    "decode_attention": [dict(s=3, h=6, h_kv=2, k=13, v=21), dict(s=1, h=1, h_kv=1, k=1, v=1)],
}
dtypes = [getattr(torch, name) for name in sys.argv[2:]]
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    native.rows(torch.randn(3, 33, 1001).to(dtype).mT)
for dtype in dtypes:
    queries, keys = torch.randn(2, 33, 6, 5).to(dtype), torch.randn(2, 30, 2, 5).to(dtype)
    selection.by_kernel(queries, keys, selection.Sizes(64, 6, 2, 4, 5, 1, 2))
"""
)
# Two calls of each op have right results.
RIGHT = (
    EXERCISE
    + """
for op, cases in cases_of.items():
    check(op, "cpu", cases=cases[:2], dtypes=dtypes, quick=True)
"""
)
# The same calls, with and without a backward pass, for the sanitizers to watch; checking results takes far longer.
CALLED = (
    EXERCISE
    + """
for op, cases in cases_of.items():
    spec, called = spec_of(op), 0
    for case in map(spec.case, cases):
        for dtype in dtypes:
            for gradients, prepared in ((False, dict), (True, with_gradients))[: 1 + spec.differentiable]:
                arguments = spec.inputs(case, dtype, "cpu", 0)
                if "cpu" in explain(spec.function(), **prepared(arguments)).able:
                    run(spec, "cpu", arguments, gradients=gradients, poison=False)
                    called += 1
    assert called >= len(dtypes) * len(cases), (op, called)
"""
)

# Many calls at once, from threads of Python's and from a forked process: all give the bits of one thread.
TOGETHER = (
    ELSEWHERE
    + """
import os, threading, torch
from ssmkernels import selective_scan
assert native.missing() is None and not native.info()["openmp"], native.info()
torch.set_num_threads(3)  # PyTorch's pool hangs in a forked process, but takes no part in what is as small as this
torch.manual_seed(0)
b, l, d, n = 2, 67, 96, 16
u, delta, B, C = torch.randn(b, l, d), torch.rand(b, l, d), torch.randn(b, l, n), torch.randn(b, l, n)
A, expected = -torch.rand(d, n), []

def scans(count):
    return all(torch.equal(selective_scan(u, delta, A, B, C, implementation="cpu"), expected[0]) for _ in range(count))

def of_python(count):
    right = []
    threads = [threading.Thread(target=lambda: right.append(scans(count))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return right == [True] * 4

torch.set_num_threads(1)
expected.append(selective_scan(u, delta, A, B, C, implementation="cpu"))
torch.set_num_threads(3)
assert scans(20)
assert of_python(20)
child = os.fork()
if child == 0:
    os._exit(0 if scans(20) and of_python(5) else 3)
assert os.waitpid(child, 0)[1] == 0
assert scans(20)
"""
)


@pytest.fixture(scope="module")
def compiler():
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"needs a C++ compiler: {error}")


def say_afresh(code, *arguments, **environment):
    """What Python prints for the code, in a process that has imported nothing."""
    answer = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-6000:]
    return answer.stdout.strip()


@pytest.fixture
def why_missing(apart):
    return lambda path: apart(ELSEWHERE + "print(native.missing())", path)


def test_info():
    info = native.info()
    if info["missing"]:
        pytest.skip(f"needs the native library: {info['missing']}")
    assert Path(info["path"]).exists()
    assert info["isa"] in info["isas"]
    assert info["isas"][0] == "baseline"
    assert info["compiler"]
    assert isinstance(info["openmp"], bool)


def test_without_a_library(tmp_path, why_missing):
    said = why_missing(tmp_path / "none.so")
    assert "was not built" in said
    assert "install a C++ compiler" in said


def test_a_file_that_is_no_library(tmp_path, why_missing):
    (tmp_path / "broken.so").write_text("not a library")
    assert "does not load" in why_missing(tmp_path / "broken.so")


def library_of(compiler, folder, source):
    (folder / "other.cpp").write_text(source)
    command = [*compiler, "-shared", "-fPIC", str(folder / "other.cpp"), "-o", str(folder / "other.so")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "other.so"


def said_by(*names):
    """Sources of a library that has these functions, with nothing to say."""
    return "".join(f'extern "C" const char* ssmzoo_{name}() {{ return ""; }}\n' for name in names)


def test_a_library_of_other_sources(compiler, tmp_path, forks, why_missing):
    """It is not loaded, and calls do not quietly go elsewhere."""
    stale = library_of(compiler, tmp_path, said_by("sources", "layouts", "isas", "compiler"))
    program = tmp_path / "program.py"
    program.write_text(ELSEWHERE + "import warnings; warnings.simplefilter('error'); native.missing()")
    done = forks.run(program, str(stale))
    assert done.status == 1
    warned = done.err.splitlines()[-1]
    for said in (warned, why_missing(stale)):
        assert f"{stale} was built from other sources than those beside it" in said
        assert "run `python -m ssmkernels.native.build`" in said


def test_a_library_of_something_else(compiler, tmp_path, why_missing):
    assert "does not load" in why_missing(library_of(compiler, tmp_path, "int nothing;"))


def test_calls_go_elsewhere_without_a_library(tmp_path, apart):
    code = (
        ELSEWHERE
        + """
import torch
from ssmkernels import explain, selective_scan
x = torch.zeros(1, 3, 2)
found = explain(selective_scan, x, x, torch.zeros(2, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
print(found.chosen, found.reasons["cpu"])
selective_scan(x, x, torch.zeros(2, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
try:
    selective_scan(x, x, torch.zeros(2, 4), torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), implementation="cpu")
except ValueError as error:
    print(error)
"""
    )
    first, second = apart(code, tmp_path / "none.so").splitlines()
    assert first.startswith("tiled the native CPU library was not built")
    assert "implementation 'cpu'" in second
    assert "was not built" in second


@pytest.mark.skipif(native.missing() is not None, reason="needs the native library")
@pytest.mark.parametrize(
    ("isa", "said"), [("avx3", "'avx3' is none of its names; there are: baseline"), ("baseline", "None")]
)
def test_forced_instruction_set(isa, said, apart):
    assert said in apart("from ssmkernels import native; print(native.missing())", SSMZOO_CPU_ISA=isa)


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"named by CXX, 'no-such-compiler', was not found; install one"):
        build.build(tmp_path / "library.so")
    assert build.wanted() == []  # who names a compiler gets no other
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert build.wanted() == ["ziglang"]
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler was found; install one .*pip install ziglang"):
        build.build(tmp_path / "library.so")
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    assert build.wanted() == []
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang")
class TestOfPip:
    """The compiler that pip brings where there is none, which also compiles for a machine that is not here."""

    @pytest.fixture(autouse=True)
    def _no_other(self, monkeypatch):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
        monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(build.CACHE.with_name("zig")))  # the C library that it compiles

    @pytest.mark.slow
    def test_builds_what_runs_here(self, tmp_path, apart):
        """Every kernel on threads of our own, which any thread of Python's may call."""
        target = tmp_path / "library.so"
        isa = native.info().get("isa", "baseline")
        build.build(target, isas=[isa], extra=["-O0", "-fno-sanitize=undefined"], cache=build.CACHE)
        apart(RIGHT, target, "float32", SSMZOO_CPU_ISA=isa)
        apart(TOGETHER, target, SSMZOO_CPU_ISA=isa)

    @pytest.mark.slow
    def test_compiles_for_a_mac(self, tmp_path, monkeypatch):
        monkeypatch.setattr(build.sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        # Zig would look for undefined behaviour, which only a library that runs can show
        extra = ["-O0", "-Werror", "-fno-sanitize=undefined"]
        build.build(tmp_path / "library", isas=["baseline"], extra=extra, cache=build.CACHE)
        assert (tmp_path / "library").read_bytes().startswith(b"\xcf\xfa\xed\xfe\x0c\x00\x00\x01")  # Mach-O, arm64


def test_a_compiler_that_does_not_run_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    stub = tmp_path / "c++"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    assert build.wanted() == ["ziglang"]
    stub.write_text("#!/bin/sh\nexit 0\n")
    assert build.wanted() == []
    assert build.find_compiler() == ["c++"]


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(build.BuildError, match="the C\\+\\+ compiler failed: (.|\n)*it is broken"):
        build.build(tmp_path / "library.so")


# A package with one kernel, which squares a number as often as its header says.
TINY = {
    "native/library.cpp": """
#define SSMZOO_PUBLIC extern "C" __attribute__((visibility("default")))
SSMZOO_PUBLIC const char* ssmzoo_sources() { return SSMZOO_SOURCES; }
SSMZOO_PUBLIC const char* ssmzoo_layouts() { return SSMZOO_LAYOUTS; }
""",
    "native/threads_openmp.cpp": "int openmp;\n",
    "native/threads_pool.cpp": "int pool;\n",
    "native/isa.h": """
#include <stdint.h>
#define SSMZOO_EXPORT(name) extern "C" __attribute__((visibility("default"))) int tiny_##name
""",
    "ops/square/cpu.h": """
#include "native/isa.h"
namespace ssmzoo {
// double wrong, in_a_comment;
struct SquareArguments {
    const double *x, *unused;  /* int64_t neither; */
    int64_t n, count;
    double scale;
};
}
constexpr int kTimes = 1;
""",
    "ops/square/cpu.cpp": """
#include "square/cpu.h"
namespace ssmzoo {
struct MoreArguments {
    SquareArguments inner;
    const void* const_free;
    double* y;
};
}
SSMZOO_EXPORT(square)(const ssmzoo::MoreArguments* a) {
    for (int i = 0; i < a->inner.n; ++i) {
        a->y[i] = a->inner.scale * a->inner.x[i];
        for (int k = 0; k < kTimes; ++k) a->y[i] *= a->y[i];
    }
    return 0;
}
""",
    "ops/other/cpu.cpp": "int other() { return 0; }\n",
}


@pytest.fixture
def tiny(tmp_path):
    package = tmp_path / "package"
    for name, text in TINY.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    for name in ("build.py", "sources.py"):
        (package / "native" / name).write_text("")
    return package


class TestChanges:
    """What a change of a source means for the library."""

    def build(self, package, **more):
        folder = package.parent / "cache"
        options = {"isas": ["baseline"], "openmp": False, "extra": ["-O0"], "cache": folder} | more
        build.build(package.parent / "library.so", package, **options)
        return {
            path.name.rpartition("-")[0]: path for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)
        }

    def test_only_what_includes_a_change_is_compiled(self, compiler, tiny):
        first = self.build(tiny)
        assert {*first} == {"square", "other", "threads_openmp", "threads_pool", "library"}
        assert self.build(tiny) == first
        (tiny / "ops/square/cpu.h").write_text(TINY["ops/square/cpu.h"].replace("kTimes = 1", "kTimes = 2"))
        second = self.build(tiny)
        assert {name for name in first if first[name] != second[name]} == {"square", "library"}
        third = self.build(tiny, extra=["-O1"])
        assert all(third[name] != second[name] for name in third)

    def test_units_are_compiled_by_fewer_passes_unless_told_otherwise(self, compiler, tiny, monkeypatch):
        assert {*sources.LIGHT} <= {*sources.kernels()}
        (tiny / "ops/other/cpu.cpp").write_text("#ifdef LIGHT\nint light() { return 0; }\n#endif\n")
        monkeypatch.setattr(build, "LIGHT", {"other": ["-DLIGHT"]})
        assert b"light" in self.build(tiny, extra=[])["other"].read_bytes()
        for extra in (["-O0"], ["-O2"]):
            assert b"light" not in self.build(tiny, extra=extra)["other"].read_bytes()
        monkeypatch.setattr(build, "LIGHT", {"other": ["-DLIGHT", "-fno-such-word-of-any-compiler"]})
        assert b"light" not in self.build(tiny, extra=[])["other"].read_bytes()

    def test_a_kernel_takes_its_arguments_by_name(self, compiler, tiny, monkeypatch):
        assert sources.layouts(tiny) == {
            "square": ["x", "unused", "n", "count", "*scale", "const_free", "y"],
        }
        self.build(tiny)
        handle = ctypes.CDLL(str(tiny.parent / "library.so"))
        handle.ssmzoo_sources.restype = handle.ssmzoo_layouts.restype = ctypes.c_char_p
        assert handle.ssmzoo_sources().decode() == sources.digest(tiny)
        handle.ssmzoo_tiny_square = handle.tiny_square
        monkeypatch.setattr(native, "library", lambda: native.Library(handle, "tiny", None))
        monkeypatch.setattr(native, "kernel", native.kernel.__wrapped__)
        x, y = torch.arange(5.0, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        values = {"y": y.data_ptr(), "x": x.data_ptr(), "unused": 0, "const_free": 0}
        values |= {"scale": 0.5, "n": 4, "count": 7}
        native.run("square", values)
        assert y.tolist() == [0.0, 0.25, 1.0, 2.25, 0.0]
        with pytest.raises(TypeError, match=r"square: `values` must have x, unused, .*; got others or not all: length"):
            native.run("square", {**values, "length": 4})
        with pytest.raises(KeyError, match="count"):
            native.run("square", {**{k: v for k, v in values.items() if k != "count"}, "length": 4})

    @pytest.mark.parametrize("file", ["native/isa.h", "native/build.py", "ops/square/cpu.cpp"])
    def test_every_edit_changes_the_digest(self, tiny, file):
        before = sources.digest(tiny)
        assert before == sources.digest(tiny)
        (tiny / file).write_text((tiny / file).read_text() + "\n")
        assert before != sources.digest(tiny)

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("int64_t n, count", "int32_t n, count", "SquareArguments: 'int32_t n, count' is no pointer, int64_t"),
            ("double scale", "float scale", "'float scale' is no pointer"),
            ("double scale", "double scale[2]", r"'double scale\[2\]' is no pointer"),
            ("double scale", "double scale = 1", "'double scale = 1' is no pointer"),
            ("double scale", "double n", "two members have the same name"),
            ("struct SquareArguments", "struct Square", "no source defines the structure SquareArguments"),
            ('#include "native/isa.h"', '#include "isa2.h"', "cpu.h: its header 'isa2.h' was not found"),
        ],
    )
    def test_a_source_that_breaks_the_rules(self, compiler, tiny, old, new, said):
        text = TINY["ops/square/cpu.h"]
        assert old in text
        (tiny / "ops/square/cpu.h").write_text(text.replace(old, new))
        with pytest.raises(build.BuildError, match=said):
            self.build(tiny)


@pytest.mark.skipif(native.missing() is not None, reason="needs the native library")
def test_no_second_openmp():
    """Two runtimes would mean two pools of threads that wait for each other."""
    if not sys.platform.startswith("linux") or not native.info()["openmp"]:
        pytest.skip("needs Linux and a library with OpenMP")
    code = "from ssmkernels import native; native.info(); print(open('/proc/self/maps').read())"
    maps = say_afresh(code).splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line or "libiomp" in line}
    assert len(runtimes) == 1, runtimes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the sanitizer is preloaded")
@pytest.mark.parametrize(
    ("sanitizer", "flags", "openmp", "dtypes"),
    [
        (
            "asan",
            # Null has no checks of its own, which would be a fifth of the compiling: it is no address to read or write
            ["-O0", "-fsanitize=address,undefined", "-fno-sanitize=null", "-fno-sanitize-recover=undefined"],
            None,
            ["float32", "float16"],  # which is read and written by other instructions
        ),
        ("tsan", ["-O0", "-fsanitize=thread"], False, ["float32"]),  # it takes OpenMP's own for races
    ],
    ids=["memory", "races"],
)
def test_under_sanitizers(sanitizer, flags, openmp, dtypes, compiler, tmp_path):
    library = subprocess.run(
        [*compiler, f"-print-file-name=lib{sanitizer}.so"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if not Path(library).is_absolute() or not Path(library).exists():
        pytest.skip(f"needs a compiler with lib{sanitizer}.so")
    target = tmp_path / "sanitized.so"
    isa = native.info().get("isa", "baseline")
    called = sum(1 << ("float32", "float64", "bfloat16", "float16").index(dtype) for dtype in dtypes)
    only = [f"-DSSMZOO_DTYPES={called}"]  # kernels of other dtypes would take as long to compile, for nothing
    build.build(target, isas=[isa], extra=[*flags, *only], openmp=openmp, cache=build.CACHE)
    say_afresh(
        CALLED,
        target,
        *dtypes,
        LD_PRELOAD=str(Path(library).resolve()),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
        TSAN_OPTIONS="ignore_noninstrumented_modules=1",
        SSMZOO_CPU_ISA=isa,
    )


@pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 400, 200), (3, 33, 1001), (2, 32768, 2), (1, 70001, 3)], ids=str)
def test_channels_before_time_are_turned_over(shape, dtype):
    torch.manual_seed(0)
    b, l, d = shape
    x = torch.randn(b, d, l).to(dtype).mT
    assert x.stride(1) == 1
    found = native.rows(x)
    assert found.is_contiguous()
    assert torch.equal(found, x)
    part = torch.randn(b, d + 5, l + 7).to(dtype)[:, 2 : 2 + d, 3 : 3 + l].mT
    assert torch.equal(native.rows(part), part)


@pytest.mark.skipif(bool(native.missing()), reason=f"needs the native CPU library: {native.missing()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(3, 40), (1, 70), (40, 2), (2, 3, 17)], ids=str)
def test_heads_of_channels_before_time_are_turned_over(heads, dtype, monkeypatch):
    torch.manual_seed(0)
    d, asked = math.prod(heads), []
    monkeypatch.setattr(native, "run", lambda name, values, run=native.run: (asked.append(name), run(name, values)))
    x = torch.randn(2, d + 5, 600 + 7).to(dtype)[:, 2 : 2 + d, 3:603].mT.unflatten(2, heads)  # of a convolution's parts
    found = native.rows(x)
    assert asked == ["transpose"]
    assert found.is_contiguous()
    assert torch.equal(found, x)
    apart = torch.randn(2, *(size + 1 for size in heads), 600).to(dtype)[
        (slice(None), *(slice(1, None) for _ in heads))
    ]
    apart = apart.movedim(-1, 1)  # channels that are no one axis, unless there is one head
    assert torch.equal(native.rows(apart), apart)
    assert len(asked) == (2 if heads[0] == 1 else 1)
