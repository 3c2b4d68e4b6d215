"""A thin bridge from setuptools to CMakeLists.txt: it runs the native build and puts dear/_C in place."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures with Ninja against the installed torch, builds, and copies the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        for tool, remedy in (
            ("cmake", "pip install cmake"),
            ("ninja", "pip install ninja"),
            ("c++", "install g++ or clang++, C++17 or later"),
        ):
            if shutil.which(tool) is None:
                raise SystemExit(f"error: {tool} is not on the PATH, and the native build needs it: {remedy}.")
        try:
            import torch  # noqa: F401
        except ImportError:
            raise SystemExit(
                "error: torch is not installed in this environment: install torch 2.11 to 2.15 first, "
                "then run pip with --no-build-isolation."
            ) from None

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}"]
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command).returncode:
                raise SystemExit(f"error: the native build failed at: {' '.join(command)}")


setup(ext_modules=[Extension("dear._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
