"""Packages that are missing, found among ours by their own names."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType

from ssmkernels.core.names import unknown

PACKAGES = ("causal_conv1d", "fla", "flash_attn", "mamba_ssm")


class Installed:
    """What :func:`install` has put in place; :meth:`restore`, or the end of ``with``, takes it away again.

    Attributes:
        packages: those that ours stand for.
        present: those that are installed themselves, and stay.
    """

    def __init__(self, packages: tuple[str, ...], present: tuple[str, ...], modules: dict[str, ModuleType]):
        self.packages, self.present = packages, present
        self._modules = modules

    def __repr__(self) -> str:
        return f"Installed(packages={self.packages}, present={self.present})"

    def restore(self) -> None:
        """Names are found no longer; what has been imported under them goes on to work."""
        for name, module in self._modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        self._modules = {}

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def install(*packages: str) -> Installed:
    """Lets ``import mamba_ssm.ops.triton.ssd_combined`` and the like find our modules, where the package is missing.

    A package that is installed is left alone. What a package has and ours has not raises ImportError, as it does now.

    Args:
        packages: of :data:`PACKAGES`; all if none.

    Raises:
        ValueError: another package; says which there are and the nearest.
    """
    for package in packages:
        if package not in PACKAGES:
            raise ValueError(unknown("package", package, PACKAGES))
    missing = tuple(package for package in packages or PACKAGES if not _there(package))
    modules = {}
    for package in missing:
        ours = importlib.import_module(f"ssmkernels.compat.{package}")
        modules[package] = ours
        for found in pkgutil.walk_packages(ours.__path__, f"{ours.__name__}."):
            modules[found.name.removeprefix("ssmkernels.compat.")] = importlib.import_module(found.name)
    sys.modules.update(modules)
    return Installed(missing, tuple(p for p in packages or PACKAGES if p not in missing), modules)


def _there(package: str) -> bool:
    """Whether a package is installed, or something else goes by its name already."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec
        return True
