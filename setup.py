"""Package map: src/fastchargpt is the package, kernels/ at the top level is its subpackage fastchargpt.kernels.

The map stands here, and not in pyproject.toml, because `packages.find` there would silently leave the kernels out of
the wheel (tests/test_packaging.py builds the wheel and looks).
"""

from setuptools import find_packages, setup

setup(
    package_dir={"": "src", "fastchargpt.kernels": "kernels"},
    packages=[
        *find_packages("src"),
        "fastchargpt.kernels",
        *(f"fastchargpt.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_data={"fastchargpt": ["py.typed"], "fastchargpt.kernels": ["tuning/*.json", "*.cpp"]},
)
