"""Products with quantised weights in every instruction set that a compiler here knows, also those of other machines.

The program quantized_linear.cpp compares each kind of weights with sums in double; it needs no PyTorch, so that an
emulator can run it.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from ssmkernels import native
from ssmkernels.native import build, library, sources

pytestmark = pytest.mark.op("quantized_linear")

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HERE = sources.flags_by_isa(platform.machine())
# Sanitizers add so much to each access that compiling it with optimisations takes three times as long; nothing is read
# or written at null, so that a check of its own adds to that alone.
SANITIZED = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize=alignment,null", "-fno-sanitize-recover=all"]


def program(compiler, flags, isa, folder, extra=()):
    """The program for an instruction set; skips where the compiler cannot make it."""
    made, package = folder / isa, sources.PACKAGE
    threads = [str(package / "native" / f"threads_{name}.cpp") for name in ("pool", "openmp")]
    own = [flag for flag in sources.FLAGS if flag not in ("-O3", "-fvisibility=hidden")]
    command = [*compiler, *own, "-O1", "-pthread", "-Wno-maybe-uninitialized", "-Wno-uninitialized", *flags, *extra]
    command += ["-DSSMZOO_DTYPES=1"]  # of x: the program's is float32
    command += [f"-DSSMZOO_ISA_{each}" for each in {sources.ADDED.get(isa, isa): 0, isa: 0}]
    command += [f"-I{package}", f"-I{package / 'ops'}"]
    source = str(Path(__file__).with_name("quantized_linear.cpp"))
    answer = subprocess.run([*command, source, *threads, "-o", str(made)], capture_output=True, text=True)
    if answer.returncode and flags and "unrecognized" in answer.stderr:
        pytest.skip(f"needs a compiler that knows {' '.join(flags)}")
    assert answer.returncode == 0, answer.stderr[-4000:]
    return str(made)


def digest(command):
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr[-4000:]
    return answer.stdout.strip()


@pytest.fixture
def compiler():
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(f"needs a C++ compiler: {error}")


def runnable():
    """The instruction sets that this machine runs; what a library was built for does not matter."""
    handle = library().handle
    return [] if handle is None else [isa for isa in HERE if handle.ssmzoo_can_run(isa.encode())]


@pytest.mark.slow
@pytest.mark.parametrize("isa", HERE)
def test_sums_in_double(isa, compiler, tmp_path):
    """Compiled for all; run, with a look at every access to memory, where this machine can."""
    if isa not in runnable():
        program(compiler, HERE[isa], isa, tmp_path)
        pytest.skip(f"compiled; to run it needs a CPU with {isa}")
    digest([program(compiler, HERE[isa], isa, tmp_path, SANITIZED)])


@pytest.mark.slow
def test_optimised_and_with_the_same_bits_in_wide_sets(compiler, tmp_path):
    digests = {isa: digest([program(compiler, HERE[isa], isa, tmp_path)]) for isa in runnable()}
    wide = [bits for isa, bits in digests.items() if isa.startswith("avx")]
    if len(wide) < 2:
        pytest.skip("needs a CPU with two of AVX2, AVX-512 and VNNI")
    assert len(set(wide)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(CROSS), reason=f"needs {CROSS}")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"needs {EMULATOR}")
@pytest.mark.parametrize("isa", sources.ISAS["aarch64"])
def test_arm(isa, tmp_path):
    """NEON and dot products of bytes."""
    made = program([CROSS], sources.ISAS["aarch64"][isa], isa, tmp_path, ["-static"])
    digest([EMULATOR, "-cpu", "max", made])


def test_a_set_that_adds_byte_products_is_compiled_for_the_kernels_that_ask():
    units, isas = sources.kernels(), ["baseline", "avx2", "avxvnni", "avx512", "avx512vnni"]
    for name, files in units.items():
        wanted = isas if name == "quantized_linear" else ["baseline", "avx2", "avx512"]
        assert sources.compiled_for(files, isas) == wanted, name


@pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")
def test_other_kernels_are_those_of_the_set_beneath():
    handle, isa, _ = library()
    if isa not in sources.ADDED:
        pytest.skip("needs a CPU with products of bytes")
    assert not hasattr(handle, f"ssmzoo_{isa}_rms_norm")
    assert native.kernel("rms_norm").function is getattr(handle, f"ssmzoo_{sources.ADDED[isa]}_rms_norm")
    assert native.kernel("quantized_linear").function is getattr(handle, f"ssmzoo_{isa}_quantized_linear")
