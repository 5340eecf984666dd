"""Builds the native CPU library: a C++ compiler is all that it needs.

Uses only the standard library, since ``setup.py`` runs it before PyTorch is there. To build the library again, after an
edit of a source or where there was no compiler::

    python -m ssmkernels.native.build
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssmkernels.native.sources import (
    ADDED,
    DIGEST,
    FLAGS,
    LIGHT,
    NAME,
    PACKAGE,
    SourceError,
    combined,
    compiled_for,
    digest,
    flags_by_isa,
    included,
    kernels,
    layouts,
)

# What was compiled before in this checkout; an installed package keeps nothing.
CACHE = PACKAGE.parent.parent / "build" / "native" if (PACKAGE.parent / "backend.py").exists() else None
KEPT = 30 * 24 * 3600  # seconds for which a compiled source that no build needs stays

# Programs to try a compiler on: any takes the first, Clang refuses the second.
NOTHING = "int main() { return 0; }\n"
OF_GCC = f"#ifdef __clang__\n#error\n#endif\n{NOTHING}"


class BuildError(Exception):
    """No library could be built; says what is missing and what to do."""


class NoCompilerError(BuildError):
    """There is no compiler."""


def build(
    target: Path,
    package: Path = PACKAGE,
    isas: Sequence[str] | None = None,
    extra: Sequence[str] = (),
    openmp: bool | None = None,
    cache: Path | None = None,
) -> None:
    """Compiles and links the library.

    Args:
        target: the file to write.
        package: the folder ``ssmkernels`` with the sources.
        isas: instruction sets to build for, and those that they add to; all that the machine's architecture and the
            compiler know if None.
        extra: further flags for the compiler and linker.
        openmp: whether long calls run on OpenMP's threads or our own; on OpenMP's where PyTorch's are the same, which
            is so for GCC's on Linux, if None.
        cache: a folder that keeps what was compiled: a source is compiled again only when it, one of its headers, the
            flags or the compiler have changed.

    Raises:
        BuildError: there is no compiler, or it fails, or a source breaks the rules of ``sources.layouts``.
    """
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder)
        flags = [*FLAGS, *extra, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        if openmp is None:
            openmp = sys.platform == "linux" and _compiles(compiler, ["-fopenmp"], temporary, OF_GCC, link=True)
        flags += ["-pthread", *(["-fopenmp"] if openmp else [])]
        if _compiles(compiler, ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Werror"], temporary):
            flags += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # GCC's own headers of AVX-512 warn
        told = any(flag.startswith("-O") for flag in flags[len(FLAGS) :])
        every = ["-Werror", *(flag for own in LIGHT.values() for flag in own)]
        light = LIGHT if not told and _compiles(compiler, every, temporary) else {}
        known = flags_by_isa(platform.machine())
        if isas is None:
            isas = [isa for isa, own in known.items() if _compiles(compiler, own, temporary)]
        isas = [isa for isa in known if isa in isas or isa in [ADDED.get(other) for other in isas]]
        version = _version(compiler, temporary)
        macros = {"COMPILER": version, "ISAS": " ".join(isas), "SOURCES": digest(package), "LAYOUTS": _layouts(package)}
        of_isa = {
            isa: [*known[isa], *(f"-DSSMZOO_ISA_{each}" for each in {ADDED.get(isa, isa): 0, isa: 0})] for isa in isas
        }
        units = sorted(kernels(package).items(), key=lambda unit: -sum(file.stat().st_size for file in unit[1]))
        jobs = [
            (name, files, [*light.get(name, ()), *of_isa[isa]])
            for name, files in units
            for isa in compiled_for(files, isas)
        ]
        own = [f"-DSSMZOO_{name}={_quoted(value)}" for name, value in macros.items()]
        jobs.append(("library", [package / "native" / "library.cpp"], own))
        jobs += [(name, [package / "native" / f"{name}.cpp"], []) for name in ("threads_openmp", "threads_pool")]
        compile_one = functools.partial(
            _compile, [*compiler, *flags], version, [package, package / "ops"], cache or temporary, temporary
        )
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, *zip(*jobs, strict=True)))
        linked = temporary / NAME
        end = shlex.split(os.environ.get("LDFLAGS", ""))
        _run([*compiler, *flags, "-shared", *map(str, objects), "-o", str(linked), *end], temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        _put(linked, target)
        if cache is not None:
            _forget(cache)


def _compile(
    command: Sequence[str],
    version: str,
    include: Sequence[Path],
    cache: Path,
    folder: Path,
    name: str,
    files: Sequence[Path],
    own: Sequence[str],
) -> Path:
    """The object file of a few sources together, as it was made before from the same contents by the same command."""
    try:
        contents = [part for path, text in included(files, include).items() for part in (path.name, text)]
    except SourceError as error:
        raise BuildError(str(error)) from error
    key = combined(version, *(part for part in command if part != sys.executable), *own, *contents)
    kept = cache / f"{name}-{key}.o"
    if kept.exists():
        os.utime(kept)
        return kept
    unit = folder / f"{name}-{key}.cpp"
    unit.write_text("".join(f'#include "{file}"\n' for file in files))
    made = folder / f"{key}.made"
    _run([*command, *(f"-I{path}" for path in include), *own, "-c", str(unit), "-o", str(made)], folder)
    cache.mkdir(parents=True, exist_ok=True)
    _put(made, kept)
    return kept


def _put(file: Path, target: Path) -> None:
    """Copies a file to its place, whole at once.

    Two builds must not write into one file, and a process that has the old library loaded keeps it.
    """
    staged = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy(file, staged)
    os.replace(staged, target)


def _forget(cache: Path) -> None:
    """Deletes what no build has needed for long."""
    for file in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another build's
            if file.stat().st_mtime < time.time() - KEPT:
                file.unlink()


def _layouts(package: Path) -> str:
    """One line a kernel: its name and its arguments."""
    try:
        return "\n".join(" ".join([kernel, *fields]) for kernel, fields in layouts(package).items())
    except SourceError as error:
        raise BuildError(str(error)) from error


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
        raise NoCompilerError(
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
    return '"' + text.replace("\\", "/").replace('"', "'").replace("\n", "\\n") + '"'


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


def main() -> None:
    """Builds the library that the package beside this file loads; in a checkout, only what has changed."""
    parser = argparse.ArgumentParser("python -m ssmkernels.native.build", description=main.__doc__)
    parser.add_argument("--optional", action="store_true", help="only warn where there is no compiler")
    optional = parser.parse_args().optional
    try:
        build(PACKAGE / NAME, cache=CACHE)
    except NoCompilerError as error:
        if not optional:
            sys.exit(str(error))
        print(f"WARNING: without the native CPU kernels, which are much faster: {error}", file=sys.stderr)
    except BuildError as error:
        sys.exit(str(error))
    else:
        (PACKAGE / DIGEST).unlink(missing_ok=True)  # the sources need no longer be as they were installed
        print(PACKAGE / NAME)


if __name__ == "__main__":
    main()
