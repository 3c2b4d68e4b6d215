"""The MPS daemon, by which several processes use one GPU at the same time: started where it is allowed, and ended."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .. import cuda
from ..processes import Processes

CONTROL = "nvidia-cuda-mps-control"
LOG = "CUDA_MPS_LOG_DIRECTORY"
SECONDS = 60  # to start, to be tried, or to end
# A daemon may start where its clients are refused.
TRIAL = [sys.executable, "-c", "import torch; assert torch.ones(2, device='cuda').sum().item() == 2"]


@contextmanager
def started() -> Iterator[str]:
    """Runs a daemon of its own meanwhile, and gives a sentence that says what became of it.

    A daemon that runs already is used and left alone. The one that is started carries the mark of `Processes`, so it
    ends with this process, also if that is killed.
    """
    if cuda.mps_runs():
        yield "MPS runs already, and is left running."
        return
    if shutil.which(CONTROL) is None:
        yield f"MPS is not used, so ranks take turns on the GPU: there is no {CONTROL} here."
        return
    before = {name: os.environ.get(name) for name in (cuda.PIPE, LOG)}
    with tempfile.TemporaryDirectory(prefix="dear-mps-") as folder, Processes() as processes:
        os.environ.update({cuda.PIPE: folder, LOG: folder})
        try:
            why = _start(processes)
            if why:
                _end(processes)
                _restore(before)  # or clients would look for the daemon, and find none
            yield f"MPS is not used, so ranks take turns on the GPU: {why}." if why else "MPS was started."
        finally:
            _end(processes)
            _restore(before)


def _start(processes: Processes) -> str | None:
    """Why there is no daemon that serves clients; None where there is."""
    pipe = subprocess.DEVNULL  # which the daemon keeps open
    try:
        status = processes.start([CONTROL, "-d"], stdout=pipe, stderr=pipe).process.wait(SECONDS)
        if status or not cuda.mps_runs():
            return f"{CONTROL} -d did not start it (exit code {status})"
        tried = subprocess.run(TRIAL, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"it had not started, or not served a client, after {SECONDS} s"
    if tried.returncode:
        return f"it refuses clients ({(tried.stderr.strip().splitlines() or ['no reason given'])[-1]})"
    return None


def _end(processes: Processes) -> None:
    """Asks the daemon to quit; what does not is killed."""
    with suppress(subprocess.TimeoutExpired):
        subprocess.run([CONTROL], input="quit\n", text=True, capture_output=True, timeout=SECONDS)
    processes.close()


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
