"""What of a machine with a GPU decides results and is not its name: driver, clocks, MPS, and how NCCL is set.

Nothing here makes a CUDA context: whoever asks may start the MPS daemon afterwards.
"""

import csv
import os
import shutil
import subprocess
from typing import Any

PIPE = "CUDA_MPS_PIPE_DIRECTORY"  # where a daemon listens, and by which its clients find it

# As nvidia-smi calls them, and as results do.
_FIELDS = {
    "compute_cap": "compute_capability",
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "most_sm_mhz",
    "power.limit": "power_limit_w",
    "compute_mode": "compute_mode",
}
_MOVING = ("sm_mhz", "memory_mhz")  # with load and temperature


def query() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where there is none, or no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    row = next(csv.reader(done.stdout.splitlines(), skipinitialspace=True), [])
    return dict(zip(_FIELDS.values(), row, strict=True)) if done.returncode == 0 and len(row) == len(_FIELDS) else {}


def mps_runs() -> bool:
    """Whether a daemon of MPS answers, by which several processes use one GPU at the same time."""
    if shutil.which("nvidia-cuda-mps-control") is None:
        return False
    try:
        done = subprocess.run(
            ["nvidia-cuda-mps-control"], input="get_server_list\n", text=True, capture_output=True, timeout=10
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and "cannot find" not in (done.stdout + done.stderr).lower()


def settings() -> dict[str, Any]:
    """What must be the same for two cells to stand in one result."""
    nccl = {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")}
    steady = {name: value for name, value in query().items() if name not in _MOVING}
    return steady | {"mps": mps_runs(), "nccl": nccl, "connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")}


def clocks() -> dict[str, str]:
    """Of this moment, in MHz."""
    return {name: value for name, value in query().items() if name in _MOVING}
