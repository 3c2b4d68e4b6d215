"""What the CUDA compiler reports of the kernels: none of them spills registers to memory. Needs nvcc, and no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SOURCES = sorted((ROOT / "csrc" / "compress" / "kernels" / "cuda").glob("*.cu"))


def report(source: Path, architecture: str) -> dict[str, int]:
    """Bytes of spill stores and loads, by kernel."""
    command = [NVCC, "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", "-c", source]
    done = subprocess.run([*map(str, command), "-o", "/dev/null"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    spills, kernel = {}, ""
    for line in done.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'|Function properties for (\w+)", line):
            kernel = found[1] or found[2]
        if found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills[kernel] = int(found[1]) + int(found[2])
    return spills


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(source: Path, architecture: str) -> None:
    spills = report(source, architecture)
    assert spills, "the compiler reported no kernel"
    assert not {kernel: size for kernel, size in spills.items() if size}
