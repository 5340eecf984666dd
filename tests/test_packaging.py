"""What is built and installed: whole, light to import, and found from wherever it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> str:
    """Runs a command outside of the repository, so that nothing is imported from its working directory."""
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel without a compiler, by way of the source distribution, out of a copy: a build writes into it."""
    source = tmp_path_factory.mktemp("build") / "source"
    caches = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for folder in ("ssmzoo", "kernels", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=caches)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source), CXX="none")
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    )
    return target


def test_wheel_holds_both_packages_and_the_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for source, package in ((ROOT / "ssmzoo", "ssmzoo"), (ROOT / "kernels" / "ssmkernels", "ssmkernels")):
        expected = {f"{package}/{path.relative_to(source).as_posix()}" for path in source.rglob("*.py")}
        assert expected <= names
        assert f"{package}/py.typed" in names
    assert {f"ssmzoo/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ssmzoo", "ssmkernels"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_says_what_its_native_sources_are(installed):
    code = (
        "from ssmkernels import native; from ssmkernels.native import sources as s; print(s.digest(), native._digest())"
    )
    digest, said = run(sys.executable, "-c", code, PYTHONPATH=str(installed)).split()
    assert (installed / "ssmkernels" / "native" / "sources.sha256").read_text() == said == digest


def test_wheel_without_a_compiler_suits_every_platform(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_installed_package_finds_its_configs(installed):
    code = "import ssmzoo; print(ssmzoo.__file__); print(*ssmzoo.list_models()); ssmzoo.build('lstm-tiny')"
    file, models = run(sys.executable, "-c", code, PYTHONPATH=str(installed)).splitlines()
    assert Path(file).is_relative_to(installed)
    assert models.split() == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_checkout_finds_its_configs():
    code = "import ssmzoo; print(ssmzoo.__file__); print(len(ssmzoo.list_models()))"
    file, models = run(sys.executable, "-c", code, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'kernels'}").splitlines()
    assert Path(file).is_relative_to(ROOT)
    assert int(models) == len(list((ROOT / "configs").glob("*.yaml")))


@pytest.mark.parametrize(
    "code",
    [
        "import ssmzoo, ssmkernels",
        "import ssmzoo; ssmzoo.list_models()",
        "import ssmzoo.cli",
    ],
)
def test_import_is_light(code):
    heavy = "{'triton', 'transformers', 'matplotlib', 'accelerate', 'tokenizers'}"
    assert run(sys.executable, "-c", f"import sys; {code}; print(*{heavy}.intersection(sys.modules))").split() == []


def test_version_is_one():
    import importlib.metadata

    import ssmzoo

    assert importlib.metadata.version("ssmzoo") == ssmzoo.__version__


def test_every_requirement_is_pinned():
    """A fresh clone gets one exact version of everything it asks for."""
    pins = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    from importlib.metadata import requires
    from re import match

    asked = {
        match(r"[\w.-]+", line).group().lower()
        for line in requires("ssmzoo")
        if "extra ==" not in line or "dev" in line
    }
    assert asked - {"ssmzoo"} <= pins
