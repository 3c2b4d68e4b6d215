"""python -m dear info: versions, backends, devices, network interface and algorithm of this installation."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import Any

import torch
import torch.distributed as dist

from dear import _address, _built, _version

from ..writing import HERE, check_json, json_option, write_json

#: What the library needs, and what its extras "plan", "auto", "mpi", "bench" and "frameworks" bring.
PACKAGES = (
    "numpy", "matplotlib", "pyyaml", "rich", "bayesian-optimization", "threadpoolctl", "mpi4py", "jinja2", "pandas",
    "scikit-learn", "lightning", "accelerate", "transformers", "peft", "ray", "torchft",
)  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    json_option(parser, "it")


def run(given: argparse.Namespace) -> None:
    check_json(given.json)
    found = collected()
    write_json(given.json, found)
    if given.json == HERE:
        return
    width = max(map(len, found))
    for key, value in found.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{key:{width}}  {text if text not in (None, '', []) else 'none'}")


def collected() -> dict[str, Any]:
    """By what a bug report wants to know. Holds no host name, no address and no path."""
    cuda, built = torch.cuda.is_available(), _built.facts()
    return {
        "dear": _version.__version__,
        "built for torch": built.get("TORCH"),
        "built for CUDA": built.get("CUDA") or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backends": [name for name in ("gloo", "nccl", "mpi", "ucc") if _available(name)],
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,  # type: ignore[no-untyped-call]
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "MPI": "through mpi4py" if importlib.util.find_spec("mpi4py") else None,
        "interface": interface(),
        "algorithm": 'host tensors under gloo: "ring", this library\'s connections; others: "native", the backend\'s',
        "kernels": f"CPU, {torch.backends.cpu.get_cpu_capability()}" + (" and CUDA" if built.get("CUDA") else ""),
        "checksums": "off" if os.environ.get("DEAR_CHECKSUM") == "0" else "on",
        "shared key": "set" if os.environ.get("DEAR_SHARED_KEY") else "not set",
        "packages": [f"{name} {_version_of(name)}" for name in PACKAGES],
    }


def interface() -> str:
    """The name of the interface whose address lanes would listen on, or why there is none."""
    try:
        address = _address.listening_address(os.environ)
    except ValueError as error:
        return str(error)
    named = next((name for name, own in _address.interfaces() if own == address), None)
    loopback = address.startswith("127.") or address == "::1"
    return (named or "unknown") + (" (loopback: other hosts cannot reach it)" if loopback else "")


def _available(backend: str) -> bool:
    return bool(getattr(dist, f"is_{backend}_available", lambda: False)()) and sys.platform != "win32"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
