"""CUB's way to the exact k-th largest magnitude: a rival that is compiled when the benchmark asks for it.

It is built by nvcc alone, into a library that is called through ctypes: no header of torch's takes part, which would
take minutes of a GPU's time, so what is measured can also be compiled where there is no GPU. Newer headers than the
compiler's own are taken from the package nvidia-cuda-cccl, where that is installed.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..records import ROOT
from .case import Case

SOURCE = Path(__file__).with_name("cub_top_k.cu")
FOLDER = ROOT / "out" / "cub"
NVCC = "/usr/local/cuda/bin"  # where NVIDIA's installers put it, often without a word on the PATH


class Unbuilt(Exception):
    """CUB's way cannot be built here. The message is a sentence that says why."""


class Library:
    """The compiled calls."""

    def __init__(self, path: Path) -> None:
        self._calls = ctypes.CDLL(str(path))
        self._calls.dear_cub_error.restype = ctypes.c_char_p
        pointer, count = ctypes.c_void_p, ctypes.c_uint
        self._calls.dear_cub_threshold.argtypes = [
            pointer, ctypes.POINTER(ctypes.c_size_t), *[pointer] * 4, count, count, pointer,
        ]  # fmt: skip

    @property
    def name(self) -> str:
        """Which of CUB's algorithms it is."""
        return "CUB's DeviceTopK" if self._calls.dear_cub_has_top_k() else "CUB's DeviceRadixSort"

    def bytes_needed(self, numel: int, k: int) -> int:
        """Of the workspace."""
        needed = ctypes.c_size_t(0)
        self._check(self._calls.dear_cub_threshold(None, needed, None, None, None, None, numel, k, None))
        return needed.value

    def threshold(self, grad: Tensor, error: Tensor, k: int, workspace: Tensor, keys: Tensor, out: Tensor) -> None:
        """The k-th largest magnitude of ``grad + error``, float32 [n], into ``out`` [1], on the current stream.

        workspace: uint8, as long as :meth:`bytes_needed` says. keys: float32 [2 n].
        """
        stream = torch.cuda.current_stream(grad.device).cuda_stream
        tensors = [each.data_ptr() for each in (grad, error, keys, out)]
        needed = ctypes.c_size_t(workspace.numel())
        self._check(self._calls.dear_cub_threshold(workspace.data_ptr(), needed, *tensors, grad.numel(), k, stream))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"CUB failed: {self._calls.dear_cub_error(code).decode()}.")


def build(architecture: str) -> Path:
    """Compiles it for a GPU such as ``"sm_90"``, once for each compiler and architecture.

    Raises:
        Unbuilt: there is no compiler, or it fails.
    """
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), NVCC]))
    if nvcc is None:
        raise Unbuilt("nvcc is not on the PATH, so CUB is not measured: install CUDA's compiler.")
    newer = [str(path) for entry in sys.path for path in Path(entry or ".").glob("nvidia/*/include/cccl")]
    command = [nvcc, "-std=c++17", f"-arch={architecture}", "-O3", "-shared", "-Xcompiler", "-fPIC", str(SOURCE)]
    command += [f"-I{path}" for path in newer]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256("\0".join([SOURCE.read_text(), version, *command]).encode()).hexdigest()[:12]
    path = FOLDER / f"cub_top_k-{digest}.so"
    if path.exists():
        return path
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, timeout=300)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
            raise Unbuilt(f"nvcc does not compile {SOURCE.name}, so CUB is not measured ({reason}).")
        unfinished.rename(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unbuilt(f"nvcc could not compile {SOURCE.name}, so CUB is not measured ({error}).") from error
    return path


@functools.cache
def library() -> Library:
    """For the current GPU."""
    major, minor = torch.cuda.get_device_capability()
    return Library(build(f"sm_{major}{minor}"))


def threshold_case(name: str, run: Callable[[], object], grad: Tensor, error: Tensor, k: int) -> Case:
    """Our exact threshold beside CUB's; where that cannot be built, ours alone and a sentence."""
    bytes_ = grad.numel() * 8
    try:
        ours = library()
    except Unbuilt as why:
        return Case(name, bytes_, run, None, failures={"CUB": str(why)})
    workspace = torch.empty(ours.bytes_needed(grad.numel(), k), dtype=torch.uint8)
    keys, out = torch.empty(2 * grad.numel()), torch.empty(1)
    return Case(name, bytes_, run, lambda: ours.threshold(grad, error, k, workspace, keys, out), rival=ours.name)
