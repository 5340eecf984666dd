"""Package mapping and the native CPU library. Everything else about the package is in pyproject.toml.

`kernels/` is a source root and no package: the importable name is `ssmkernels`.
`configs/` is data, installed as `ssmzoo/configs`.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path(__file__).resolve().parent / "kernels"

sys.path.insert(0, str(KERNELS))
from backend import native_build  # noqa: E402

native = native_build()


class BuildNative(build_ext):
    """The library without Python in it: plain C functions, loaded by ctypes. Without a compiler the install goes on."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], native.NAME))

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        package = target.parent
        if not self.editable_mode:  # a package whose sources nobody edits need not look at them again
            (package / native.DIGEST).parent.mkdir(parents=True, exist_ok=True)
            (package / native.DIGEST).write_text(native.digest())
        try:
            native.build(target, cache=native.CACHE)
        except native.BuildError as error:
            print(f"WARNING: without the native CPU kernels, which are much faster: {error}", file=sys.stderr)
            target.unlink(missing_ok=True)  # one of an older version

    def get_output_mapping(self):
        return {built: source for built, source in super().get_output_mapping().items() if Path(source).exists()}


class Wheel(bdist_wheel):
    """One wheel for every Python and every PyTorch; for every platform too where there was no compiler."""

    def get_tag(self):
        built = next(Path(self.bdist_dir).rglob(native.NAME), None) if self.bdist_dir else None
        return ("py3", "none", super().get_tag()[2] if built else "any")


setup(
    packages=[
        *find_packages(include=["ssmzoo", "ssmzoo.*"]),
        *find_packages("kernels", include=["ssmkernels", "ssmkernels.*"]),
        "ssmzoo.configs",
    ],
    package_dir={
        "ssmzoo": "ssmzoo",
        "ssmkernels": "kernels/ssmkernels",
        "ssmzoo.configs": "configs",
    },
    package_data={
        "ssmzoo": ["py.typed"],
        "ssmkernels": ["py.typed"],
        "": ["*.cpp", "*.h"],
        "ssmzoo.configs": ["*.yaml"],
    },
    ext_modules=[Extension("ssmkernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
