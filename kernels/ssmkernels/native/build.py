"""Builds the native CPU library: a C++ compiler is all that it needs.

Imports only the standard library, since ``setup.py`` runs it before PyTorch is there. To build it again by hand::

    python kernels/ssmkernels/native/build.py
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Raised whenever an argument structure or an exported function changes: a library of another number is refused.
ABI = 3

PACKAGE = Path(__file__).resolve().parent.parent
NAME = "_native.dylib" if sys.platform == "darwin" else "_native.so"

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",  # with nothing of the C++ library either, no linker needs to know of one
    "-ffp-contract=off",  # two paths through a kernel must round alike
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ISAS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw"],
}

# Programs to try a compiler on: any takes the first, Clang refuses the second.
NOTHING = "int main() { return 0; }\n"
OF_GCC = f"#ifdef __clang__\n#error\n#endif\n{NOTHING}"


class BuildError(Exception):
    """No library could be built; says what is missing and what to do."""


def build(
    target: Path,
    package: Path = PACKAGE,
    isas: Sequence[str] | None = None,
    extra: Sequence[str] = (),
    openmp: bool | None = None,
) -> None:
    """Compiles and links the library.

    Args:
        target: the file to write.
        package: the folder ``ssmkernels`` with the sources.
        isas: instruction sets to build for; all that the machine's architecture and the compiler know if None.
        extra: further flags for the compiler and linker.
        openmp: whether long calls run on OpenMP's threads or our own; on OpenMP's where PyTorch's are the same, which
            is so for GCC's on Linux, if None.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = find_compiler()
    flags = [*FLAGS, f"-I{package}", f"-I{package / 'ops'}", *extra, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder)
        if openmp is None:
            openmp = sys.platform == "linux" and _compiles(compiler, ["-fopenmp"], temporary, OF_GCC, link=True)
        flags += ["-pthread", *(["-fopenmp"] if openmp else [])]
        if _compiles(compiler, ["-Wno-maybe-uninitialized", "-Werror"], temporary):
            flags.append("-Wno-maybe-uninitialized")  # GCC's own headers of AVX-512 warn
        if isas is None:
            known = ISAS if platform.machine().lower() in ("x86_64", "amd64") else ("baseline",)
            isas = [isa for isa in known if _compiles(compiler, ISAS[isa], temporary)]
        jobs = []
        for source in sorted([*package.glob("native/cpu*.cpp"), *package.glob("ops/*/cpu*.cpp")]):
            for isa in isas:
                output = temporary / f"{source.parent.name}-{source.stem}-{isa}.o"
                jobs.append(
                    [*compiler, *flags, *ISAS[isa], f"-DSSMZOO_ISA_{isa}", "-c", str(source), "-o", str(output)]
                )
        defines = {"ABI": str(ABI), "COMPILER": _quoted(_version(compiler, temporary)), "ISAS": _quoted(" ".join(isas))}
        defined = [f"-DSSMZOO_{name}={value}" for name, value in defines.items()]
        for name in ("library", "threads_openmp", "threads_pool"):
            source = package / "native" / f"{name}.cpp"
            jobs.append([*compiler, *flags, *defined, "-c", str(source), "-o", str(temporary / f"{name}.o")])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(functools.partial(_run, folder=temporary), jobs))
        linked = temporary / NAME
        objects = [job[-1] for job in jobs]
        end = shlex.split(os.environ.get("LDFLAGS", ""))
        _run([*compiler, *flags, "-shared", *objects, "-o", str(linked), *end], temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f"{target.name}.{os.getpid()}")  # two builds at once must not write into one file
        shutil.copy(linked, staged)
        os.replace(staged, target)  # a process that has the old one loaded keeps it


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``CXX`` where set, else the first of c++, g++ and clang++ that runs, else Clang out
    of the package ``ziglang`` where that is installed.

    Raises:
        BuildError: there is none, or this is no platform that the kernels are written for.
    """
    if sys.platform == "win32" or sys.maxsize < 2**32:
        raise BuildError(f"the native kernels are written for 64-bit Linux and macOS, not for {platform.platform()}")
    named = shlex.split(os.environ.get("CXX", ""))
    if named and not shutil.which(named[0]):
        raise BuildError(
            f"the C++ compiler named by CXX, {named[0]!r}, was not found; install one (g++ or clang++) and install "
            "ssmzoo again"
        )
    if named and os.sep in named[0]:
        named[0] = os.path.abspath(named[0])  # the build calls it from elsewhere
    command = named or _on_path() or _packaged()
    if not command:
        raise BuildError(
            "no C++ compiler was found; install one (g++ or clang++, or `pip install ziglang`) and install ssmzoo again"
        )
    return command


def wanted() -> list[str]:
    """The packages that a build needs beside setuptools: a compiler, where there is none and nobody named one."""
    return [] if os.environ.get("CXX") or _on_path() or not _zig_target() else ["ziglang"]


def _on_path() -> list[str] | None:
    """The first that runs: macOS has a c++ which, without Apple's developer tools, only says that they are missing."""
    names = filter(shutil.which, ("c++", "g++", "clang++"))
    return next(([name] for name in names if _answers(name)), None)


def _answers(name: str) -> bool:
    try:
        return subprocess.run([name, "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _packaged() -> list[str] | None:
    """Clang, as Zig brings it. Without a target it would compile for the CPU of this one machine."""
    target = _zig_target()
    if target is None or importlib.util.find_spec("ziglang") is None:
        return None
    return [sys.executable, "-m", "ziglang", "cc", "-g0", "-target", target]


def _zig_target() -> str | None:
    """This platform by Zig's name; None where PyPI has no Zig for it."""
    machine = {"x86_64": "x86_64", "amd64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}
    system = {"linux": "linux-gnu.2.17", "darwin": "macos"}  # glibc 2.17: that of PyPI's own oldest wheels
    if platform.machine().lower() not in machine or sys.platform not in system:
        return None
    return f"{machine[platform.machine().lower()]}-{system[sys.platform]}"


def _version(compiler: Sequence[str], folder: Path) -> str:
    answer = _call([*compiler, "--version"], folder)
    return answer.stdout.partition("\n")[0].strip() or compiler[0]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "/").replace('"', "'") + '"'


def _compiles(
    compiler: Sequence[str], flags: Sequence[str], folder: Path, program: str = NOTHING, link: bool = False
) -> bool:
    source = folder / "probe.cpp"
    source.write_text(program)
    command = [*compiler, *flags, *([] if link else ["-c"]), str(source), "-o", str(folder / "probe")]
    return _call(command, folder).returncode == 0


def _call(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a compiler so that what it leaves behind is in the folder: Zig has a cache, and drops an a.o for macOS."""
    caches = {"ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**caches, **os.environ}, check=False
    )


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        result = _call(command, folder)
    except OSError as error:
        raise BuildError(f"the C++ compiler does not run: {error}") from error
    if result.returncode != 0:
        raise BuildError(f"the C++ compiler failed: {shlex.join(command)}\n{result.stderr.strip()}")
    if result.stderr.strip():
        print(result.stderr, file=sys.stderr)


if __name__ == "__main__":
    try:
        build(PACKAGE / NAME)
    except BuildError as error:
        sys.exit(str(error))
    print(PACKAGE / NAME)
