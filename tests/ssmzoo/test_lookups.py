"""The wrappers of transformers' decorator: each version keeps something else in their cells."""

from __future__ import annotations

import importlib.util

import pytest

from ssmzoo.integrations.transformers.lookups import lookups_of

pytestmark = pytest.mark.mixer()

SOURCE = """
import functools

def use_kernel_func_from_hub_with_fallback(func_name, package):
    def decorator(torch_function):
        implementation, applicable_params = torch_function, ("x", "scale")
        is_new_implementation = False

        @functools.wraps(torch_function)
        def wrapped(*args, **kwargs):
            {early}
            kwargs = {{k: v for k, v in kwargs.items() if k in applicable_params}}
            return implementation(*args, **kwargs)

        return wrapped

    return decorator

def other(function):
    return function

@use_kernel_func_from_hub_with_fallback("scan", "some_package")
@other
def torch_scan(x, scale=1):
    return x * scale

@use_kernel_func_from_hub_with_fallback(
    "update",
    "some_package",
)
def update(x, scale=1):
    return x + scale
"""
EARLY = {
    "5.15": "",
    "5.16": "if is_new_implementation and not args: return torch_function(*args, **kwargs)",
    "5.17": "if not (is_new_implementation or args): return torch_function(func_name, package)",
}


@pytest.mark.parametrize("version", EARLY)
def test_functions_of_every_version_are_found_and_put_back(version, tmp_path):
    path = tmp_path / f"modeling_{version.replace('.', '_')}.py"
    path.write_text(SOURCE.format(early=EARLY[version]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scan, update = lookups_of(module)
    assert [(one.function, one.package) for one in (scan, update)] == [
        ("scan", "some_package"),
        ("update", "some_package"),
    ]
    asked = []
    scan.supply(lambda x, more=0: asked.append(x) or x + more)
    assert module.torch_scan(3, more=4, scale=9) == 7  # our function knows other options
    assert module.update(3, scale=2, more=5) == 5
    scan.restore()
    assert module.torch_scan(3, more=4, scale=9) == 27
    assert asked == [3]


def test_a_function_that_was_found_in_its_package_stays(tmp_path):
    path = tmp_path / "modeling_found.py"
    path.write_text(SOURCE.format(early="").replace("= torch_function, (", "= (lambda x: -x), ("))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for lookup in lookups_of(module):
        lookup.supply(lambda x: 0)
    assert module.torch_scan(3) == module.update(3) == -3
