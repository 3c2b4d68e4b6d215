"""A thin bridge from setuptools to CMakeLists.txt: it runs the native build and puts dear/_C in place."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent


def need_torch() -> None:
    """Ends the build with one sentence where torch is not installed.

    The module works only with the torch that it was compiled against, so torch is no requirement of the build: pip
    would bring the newest one, whatever is installed. Where pip isolates the build, this Python finds the installed one
    without pip's PYTHONPATH; CMakeLists.txt looks for it in the same two places.
    """
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    look = [sys.executable, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"]
    if all(subprocess.run(look, env=one, cwd=ROOT.anchor).returncode for one in (None, outside)):
        raise SystemExit(
            "error: torch is not installed in this environment: install torch 2.11 to 2.15 first (`pip install "
            "torch`), or, where it is installed and the build is isolated from it, add --no-build-isolation."
        )


class DistInfo(dist_info):
    """The first thing that pip asks for: without torch the sentence comes before pip downloads the dependencies."""

    def run(self) -> None:
        need_torch()
        super().run()


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
        need_torch()

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}"]
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command).returncode:
                raise SystemExit(f"error: the native build failed at: {' '.join(command)}")
        if getattr(self, "editable_mode", False) and target != ROOT / "dear":  # setuptools takes the module alone there
            shutil.copy(target / "_build.py", ROOT / "dear")


setup(ext_modules=[Extension("dear._C", sources=[])], cmdclass={"build_ext": CMakeBuild, "dist_info": DistInfo})
