"""Package map: src/fastchargpt is the package; kernels/ and bench/ are its subpackages fastchargpt.kernels and .bench.

The map stands here, and not in pyproject.toml, because `packages.find` there would silently leave the kernels out of
the wheel (tests/test_packaging.py builds the wheel and looks).
"""

from setuptools import find_packages, setup

setup(
    package_dir={"": "src", "fastchargpt.kernels": "kernels", "fastchargpt.bench": "bench"},
    packages=[
        *find_packages("src"),
        "fastchargpt.kernels",
        *(f"fastchargpt.kernels.{name}" for name in find_packages("kernels")),
        "fastchargpt.bench",  # so that `fastchargpt bench` runs the suite from an installed wheel too
    ],
    package_data={"fastchargpt": ["py.typed"], "fastchargpt.kernels": ["tuning/*.json", "*.cpp", "*.h"]},
)
