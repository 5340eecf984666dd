"""Package mapping. Everything else about the package is in pyproject.toml.

`kernels/` is a source root and no package: the importable name is `ssmkernels`.
`configs/` is data, installed as `ssmzoo/configs`.
"""

from setuptools import find_packages, setup

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
        "ssmzoo.configs": ["*.yaml"],
    },
)
