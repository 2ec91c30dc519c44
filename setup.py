"""Package map: src/fastchargpt is the package; kernels/ and bench/ are its subpackages fastchargpt.kernels and .bench.

The map stands here, and not in pyproject.toml, because `packages.find` there would silently leave the kernels out of
the wheel (tests/test_packaging.py builds the wheel and looks). The C++ files are compiled too, where that can be done:
a library serves the kind of processor that it was built on, elsewhere the package builds its own on first use.
"""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

KERNELS = Path(__file__).parent / "kernels"

spec = importlib.util.spec_from_file_location("cpu_compiler", KERNELS / "cpu_compiler.py")
assert spec is not None
assert spec.loader is not None
compiler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiler)


class BuildNative(build_ext):
    """Compiles as the package itself would; the libraries are loaded by ctypes and know nothing of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's name, in the package's folder."""
        *folders, name = fullname.split(".")
        return str(Path(*folders, compiler.library_name(KERNELS / f"{name}.cpp")))

    def build_extension(self, ext: Extension) -> None:
        """Compile one file; an error is a warning, as the extension is optional."""
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in (target.parent, KERNELS):  # what earlier sources left, which nothing would load any more
            for old in folder.glob(f"{name}-*.so"):
                if old.name != target.name:
                    old.unlink()
        try:
            compiler.build_library(KERNELS / f"{name}.cpp", target, compiler.NATIVE[name])
        except compiler.CompilerError as error:
            raise CompileError(f"{error}; it will be built on first use, where it can be") from None


class PlatformWheel(bdist_wheel):
    """A wheel of one platform, and of any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """The wheel's tag: no part of it was compiled against Python."""
        return "py3", "none", super().get_tag()[2]


setup(
    package_dir={"": "src", "fastchargpt.kernels": "kernels", "fastchargpt.bench": "bench"},
    packages=[
        *find_packages("src"),
        "fastchargpt.kernels",
        *(f"fastchargpt.kernels.{name}" for name in find_packages("kernels")),
        "fastchargpt.bench",  # so that `fastchargpt bench` runs the suite from an installed wheel too
    ],
    package_data={"fastchargpt": ["py.typed"], "fastchargpt.kernels": ["tuning/*.json", "*.cpp", "*.h"]},
    ext_modules=[
        Extension(f"fastchargpt.kernels.{name}", [f"kernels/{name}.cpp"], optional=True) for name in compiler.NATIVE
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
