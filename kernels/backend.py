"""setuptools' build backend, which also asks for a compiler where the machine has none: pip brings it for the build."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def native_build() -> Any:
    """The module ``ssmkernels.native.build``. What its packages import needs PyTorch, so they stay empty here."""
    for name in ("ssmkernels", "ssmkernels.native"):
        package = ModuleType(name)
        package.__path__ = [str(Path(__file__).parent.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)
    return importlib.import_module("ssmkernels.native.build")


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *native_build().wanted()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *native_build().wanted()]
