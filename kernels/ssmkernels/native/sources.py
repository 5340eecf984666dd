"""What the native library is made of: its sources with their digest, and the layouts of its kernels' arguments.

Imports only the standard library, since ``setup.py`` reads it before PyTorch is there.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent  # ssmkernels
NAME = "_native.dylib" if sys.platform == "darwin" else "_native.so"
DIGEST = "native/sources.sha256"  # beside the sources of an installed package, which nobody edits

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
# Flags of GCC for single units, whose kernels gain nothing from the passes that these leave out, which are up to a
# sixth of the time of compiling. The scan's loops of known length stay unrolled: what they go through is in registers.
FEWER = ["-fno-tree-pre", "-fno-gcse", "-fno-split-paths", "-fno-ipa-cp-clone", "-fno-tree-slp-vectorize"]
LIGHT = {
    **dict.fromkeys(("causal_conv1d", "decode_attention", "dplr_kernel", "fft_conv"), FEWER),
    "selective_scan": ["-O2", "-fpeel-loops", "-fvect-cost-model=dynamic"],
}
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw"]
ISAS = {  # by architecture; each is better than those before it
    "x86_64": {
        "baseline": [],
        "avx2": AVX2,
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx512": AVX512,
        "avx512vnni": [*AVX512, "-mavx512vnni"],
    },
    "aarch64": {"baseline": [], "dotprod": ["-march=armv8.2-a+dotprod"]},
}
# Instruction sets that add products of bytes to another, for the kernels that ask for them, as
# quantized_linear/cpu_isa.h does; the others are that one's.
ADDED = {"avxvnni": "avx2", "avx512vnni": "avx512", "dotprod": "baseline"}
ASKED = b"SSMZOO_BYTE_PRODUCTS"


class SourceError(Exception):
    """A source that does not follow the rules of :func:`layouts`; says where."""


def kernels(package: Path = PACKAGE) -> dict[str, list[Path]]:
    """The sources that are compiled once for each instruction set, by folder: an op's together are one unit.

    Reading the compiler's own headers takes as long as compiling a small kernel.
    """
    found: dict[str, list[Path]] = {}
    for source in sorted([*package.glob("native/cpu*.cpp"), *package.glob("ops/*/cpu*.cpp")]):
        found.setdefault(source.parent.name, []).append(source)
    return found


def flags_by_isa(machine: str) -> dict[str, list[str]]:
    """The instruction sets of a machine's architecture, as ``platform.machine`` names it, with the compiler's flags."""
    names = {"amd64": "x86_64", "arm64": "aarch64"}
    return ISAS.get(names.get(machine.lower(), machine.lower()), {"baseline": []})


def compiled_for(files: Sequence[Path], isas: Sequence[str]) -> list[str]:
    """Those of the instruction sets for which a unit of :func:`kernels` is compiled."""
    folder = files[0].parent
    asks = any(ASKED in file.read_bytes() for end in ("cpp", "h") for file in folder.glob(f"cpu*.{end}"))
    return [isa for isa in isas if asks or isa not in ADDED]


def digest(package: Path = PACKAGE) -> str:
    """Of everything in the package that the library depends on, how it is built included."""
    files = [package / "native" / name for name in ("build.py", "sources.py")]
    files += [
        file for folder in ("native", "ops/*") for end in ("cpp", "h") for file in package.glob(f"{folder}/*.{end}")
    ]
    return combined(*(part for file in sorted(files) for part in (str(file.relative_to(package)), file.read_bytes())))


def combined(*parts: str | bytes) -> str:
    """One digest of all."""
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(b"%d:" % len(data) + data)
    return found.hexdigest()


def included(sources: Iterable[Path], folders: Sequence[Path]) -> dict[Path, bytes]:
    """The contents of sources and of all our own headers that they include, by path."""
    found: dict[Path, bytes] = {}
    waiting = list(sources)
    while waiting:
        file = waiting.pop().resolve()
        if file in found:
            continue
        found[file] = file.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', found[file], re.MULTILINE):
            places = [folder / name.decode() for folder in (file.parent, *folders)]
            existing = next(filter(Path.exists, places), None)
            if existing is None:
                raise SourceError(f"{file}: its header {name.decode()!r} was not found")
            waiting.append(existing)
    return found


def layouts(package: Path = PACKAGE) -> dict[str, list[str]]:
    """The arguments of each kernel, in their order in memory.

    Read from the C++ sources, where a kernel is ``SSMZOO_EXPORT(name)(const ssmzoo::Structure* a)`` or, by one of the
    macros of ``exports.h``, ``SSMZOO_EXPORT_DTYPES(name, Structure, dtype, function)``. A structure's members are
    pointers, ``int64_t``, ``double`` (marked ``*`` in front of the name here), and other such structures, which stand
    here as their members. All are 8 bytes, so that there is no padding.

    Raises:
        SourceError: a structure is missing, defined twice, or has another member.
    """
    structures: dict[str, str] = {}
    exports: dict[str, str] = {}
    for folder in ("native", "ops/*"):
        for file in sorted([*package.glob(f"{folder}/*.h"), *package.glob(f"{folder}/*.cpp")]):
            text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", file.read_text(), flags=re.DOTALL)
            text = re.sub(r"^\s*#(?:.*\\\n)*.*$", "", text, flags=re.MULTILINE)  # a macro's text is no kernel
            exports |= re.findall(r"SSMZOO_EXPORT\((\w+)\)\(const ssmzoo::(\w+)\s*\*", text)
            exports |= re.findall(r"SSMZOO_EXPORT_(?:DTYPES|SUMS)\((\w+),\s*(\w+),", text)
            for name, body in re.findall(r"\bstruct (\w+Arguments) \{(.*?)\n\};", text, re.DOTALL):
                if name in structures:
                    raise SourceError(f"{file}: the structure {name} is defined twice")
                structures[name] = body
    return {kernel: _members(name, structures) for kernel, name in sorted(exports.items())}


def _members(name: str, structures: Mapping[str, str]) -> list[str]:
    if name not in structures:
        raise SourceError(f"no source defines the structure {name}; names of arguments' structures end in Arguments")
    found: list[str] = []
    for statement in filter(None, map(str.strip, structures[name].split(";"))):
        match = re.fullmatch(r"(?:const\s+)?(\w+)\b\s*([^=]*)", statement)
        kind, names = match.groups() if match else ("", "")
        if kind.endswith("Arguments") and re.fullmatch(r"\w+", names):
            found += _members(kind, structures)
            continue
        for declared in map(str.strip, names.split(",")):
            field = re.fullmatch(r"(\*?)\s*(\w+)", declared)
            if field is None or not (field[1] or kind in ("int64_t", "double")):
                raise SourceError(f"{name}: {statement!r} is no pointer, int64_t, double or structure of arguments")
            found.append("*" * (kind == "double" and not field[1]) + field[2])
    if len({field.lstrip("*") for field in found}) < len(found):
        raise SourceError(f"{name}: two members have the same name")
    return found
