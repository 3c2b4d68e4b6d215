"""Builds the extension in place for the GPU that is here, and runs one kernel on it: python -m benchmarks.gpu.build.

What has not changed is not compiled again.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from .. import cuda
from ..command import fail
from ..records import ROOT

FOLDER = ROOT / "out" / "gpu-build"
NVCC = Path("/usr/local/cuda/bin")  # where NVIDIA's installers put it, often without a word on the PATH
# Without which the tests behind the build cannot run, by the module that each has.
PACKAGES = {"pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis", "numpy": "numpy"}
TOOLS = {"cmake": "pip install cmake", "ninja": "pip install ninja", "nvcc": "install CUDA's compiler"}
TRIAL = """
import torch
from compress import ops
error = torch.zeros(4, device="cuda")
ops.error_correct(torch.ones(4, device="cuda"), error)
assert error.sum().item() == 4
try:
    ops.error_correct(torch.ones(4, device="cuda"), torch.zeros(3, device="cuda"))
except ValueError as refusal:
    assert "3" in str(refusal)  # numbers in native sentences: with two C++ libraries in the process they crash
"""


def environment(capability: str) -> dict[str, str]:
    """In which the tools are found, and torch compiles for that GPU alone."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), str(NVCC)])
    return {**os.environ, "PATH": path, "TORCH_CUDA_ARCH_LIST": capability, "PYTHONPATH": str(ROOT)}


def commands() -> list[list[str]]:
    """Configure, build, try."""
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(FOLDER), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'dear'}"]
    return [configure, ["cmake", "--build", str(FOLDER)], [sys.executable, "-c", TRIAL]]


def main() -> None:
    capability = cuda.query().get("compute_capability")
    if capability is None:
        fail("nvidia-smi names no GPU here: run this where there is one.")
    env = environment(capability)
    for tool, remedy in TOOLS.items():
        if shutil.which(tool, path=env["PATH"]) is None:
            fail(f"{tool} is not on the PATH, and the build needs it: {remedy}.")
    for module, package in PACKAGES.items():
        if find_spec(module) is None:
            fail(f"The package {package} is not installed, and the tests need it: pip install {package}.")
    for command in commands():
        if subprocess.run(command, env=env, cwd=ROOT).returncode:
            fail(f"The build for a GPU of compute capability {capability} ended at: {' '.join(command[:3])}.")


if __name__ == "__main__":
    main()
