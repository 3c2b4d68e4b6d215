"""Joins the process group, whichever launcher started us: torchrun, mpirun or srun.

What the launchers say about a process is read by `detect`, which looks at nothing but the environment it is given.
`init_process_group` acts upon it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from dear import _ports
from dear._address import listening_address
from dear._generation import agree_on_generation, store_outlives_us

__all__ = ["Job", "detect", "expand_nodelist", "init_process_group"]

HOW_TO_START = "start it with a launcher, for example: torchrun --nproc_per_node=2 train.py"


@dataclass(frozen=True)
class Job:
    """This process's place among all of them; None for what the environment does not tell."""

    launcher: str  # "torchrun" (or whoever sets its variables), "mpirun", "srun"
    rank: int
    world_size: int | None
    local_rank: int | None
    address: str | None  # of rank 0
    port: int | None

    def environment(self) -> dict[str, str]:
        """The variables by which user code knows its place."""
        known = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        return {name: str(value) for name, value in known.items() if value is not None}


def init_process_group(backend: str | None = None, timeout: timedelta | float | None = None, **kwargs: Any) -> None:
    """`torch.distributed.init_process_group`, with rank, world size and address taken from the launcher.

    Works under torchrun, mpirun (through mpi4py, with whichever MPI is found at run time) and srun, looked for in this
    order, and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher did not. MASTER_ADDR
    and MASTER_PORT, where set, are kept. Under mpirun, MPI is only used to agree on an address and is finalized
    thereafter, unless the script had initialized it: ranks waiting for each other in MPI_Finalize would keep a failed
    one from ending. Under torchrun, processes that are started anew (--max-restarts) meet no address of those before
    them.

    backend: NCCL if there is CUDA, otherwise gloo. With NCCL, this process's device becomes the one of its local rank.
    timeout: of collectives, a timedelta or seconds; by default torch's.
    kwargs: passed on. With init_method, store, rank or world_size among them, no launcher is looked for.

    If the process group exists already it is left as it is; raises ValueError if it has another backend than the one
    asked for. Raises RuntimeError, saying what to do, if there is no launcher, if what it set makes no sense, or if
    MPI cannot be used.
    """
    if dist.is_initialized():
        if backend not in (None, dist.get_backend()):
            raise ValueError(
                f"the process group exists already with backend {dist.get_backend()!r}, not {backend!r}: "
                "call dear.init_process_group() once, before anything else does"
            )
        return
    if backend is None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    if timeout is not None:
        kwargs["timeout"] = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    if not kwargs.keys() & {"init_method", "store", "rank", "world_size"}:
        job = detect(os.environ)
        if job.launcher == "mpirun" and backend != "mpi":  # that one asks MPI itself
            job = _agree_through_mpi(job)
        os.environ.update(job.environment())
        if "nccl" in backend:
            torch.cuda.set_device(_device_index(job, torch.cuda.device_count()))
        if store_outlives_us(os.environ) and backend != "mpi":
            kwargs |= _own_store(kwargs.get("timeout", default_pg_timeout))
    dist.init_process_group(backend, **kwargs)


def _own_store(timeout: timedelta) -> dict[str, Any]:
    """The elastic agent's store, with keys of this generation's own."""
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    name = agree_on_generation(store, rank, world_size, timeout)
    return {"store": dist.PrefixStore(f"generation/{name}", store), "rank": rank, "world_size": world_size}


# ----------------------------------------------------------------------------------------- what the environment says


def detect(env: Mapping[str, str]) -> Job:
    """Reads the launcher's variables. Raises RuntimeError if there are none, or if they contradict each other."""
    job = _torchrun(env) or _mpirun(env) or _srun(env)
    if job is None:
        if "WORLD_SIZE" in env:
            raise RuntimeError(f"WORLD_SIZE is set but RANK is not: set both, or unset it and {HOW_TO_START}")
        if "SLURM_JOB_ID" in env:
            raise RuntimeError(
                "this is a Slurm job, but srun did not start this process: put srun before the command, for example: "
                "srun --ntasks=2 python train.py"
            )
        raise RuntimeError(f"this process was started by itself: {HOW_TO_START}")
    if job.world_size is not None and not 0 <= job.rank < job.world_size:
        raise RuntimeError(
            f"{job.launcher} says rank {job.rank} of {job.world_size}, but ranks run from 0 to the world size less 1: "
            "correct or unset the variables"
        )
    return job


def _torchrun(env: Mapping[str, str]) -> Job | None:
    if "RANK" not in env:
        return None
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        names = " and ".join(missing)
        raise RuntimeError(f"RANK is set but {names} not: set all of them, or unset RANK and {HOW_TO_START}")
    return Job(
        launcher="torchrun",
        rank=_number(env, "RANK"),
        world_size=_number(env, "WORLD_SIZE"),
        local_rank=_optional(env, "LOCAL_RANK"),
        address=env["MASTER_ADDR"],
        port=_number(env, "MASTER_PORT"),
    )


def _mpirun(env: Mapping[str, str]) -> Job | None:
    """Open MPI; MPICH, Intel MPI and whatever else uses Hydra; a PMIx server alone, which does not tell the size."""
    for rank, size, local_rank in (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
        ("PMIX_RANK", "", ""),
    ):
        if rank not in env:
            continue
        # srun, too, offers PMI or PMIx to its tasks, which need no MPI to find each other: Slurm shall answer. Under a
        # Hydra whose daemons were started by srun, Slurm's variables are the daemon's, and do not agree.
        same_rank = env.get("SLURM_PROCID") == env[rank]
        if rank.startswith("PMI") and same_rank and _slurm_size(env) == env.get(size, _slurm_size(env)):
            continue
        if size and size not in env:
            raise RuntimeError(f"{rank} is set but {size} is not: start the script with mpirun, or unset {rank}")
        return Job(
            launcher="mpirun",
            rank=_number(env, rank),
            world_size=_optional(env, size),
            local_rank=_optional(env, local_rank),
            address=env.get("MASTER_ADDR"),
            port=_optional(env, "MASTER_PORT"),
        )
    return None


def _srun(env: Mapping[str, str]) -> Job | None:
    size = _slurm_size(env)
    if "SLURM_PROCID" not in env or size is None:
        return None
    # A batch script, and the shell of an interactive allocation, carry Slurm's variables as well, and the number of
    # tasks that an srun would start. They are one process each: waiting for the others would never end.
    if "SLURM_STEP_NUM_TASKS" not in env and (env.get("ENVIRONMENT") == "BATCH" or size == "1"):
        return None
    if env.get("SLURM_STEP_ID") in ("4294967290", "4294967291"):  # Slurm's own numbers for the two
        return None
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    address = env.get("MASTER_ADDR")
    if not address:
        if not nodes:
            raise RuntimeError("SLURM_JOB_NODELIST is not set, so rank 0 cannot be found: set MASTER_ADDR to its host")
        address = next(expand_nodelist(nodes))
    return Job(
        launcher="srun",
        rank=_number(env, "SLURM_PROCID"),
        world_size=_number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"),
        local_rank=_optional(env, "SLURM_LOCALID"),
        address=address,
        port=_optional(env, "MASTER_PORT") or _slurm_port(env),
    )


def _slurm_size(env: Mapping[str, str]) -> str | None:
    # The step's, since an srun may start fewer tasks than the job was given.
    return env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS")


def _slurm_port(env: Mapping[str, str]) -> int:
    """The same on every task, and another for every job and step."""
    if "SLURM_JOB_ID" not in env:
        raise RuntimeError("SLURM_JOB_ID is not set, so no port can be derived from it: set MASTER_PORT to a free port")
    number = _number(env, "SLURM_JOB_ID") * 31 + (_optional(env, "SLURM_STEP_ID") or 0)
    return _ports.FIRST + number % _ports.COUNT


_RANGES = r"\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_HOST = rf"(?:[^,\[\]\s]|{_RANGES})+"


def expand_nodelist(nodelist: str) -> Iterator[str]:
    """The hosts of Slurm's notation, in order: "a[01-02,7]-x,b" gives a01-x, a02-x, a7-x, b.

    Raises RuntimeError if it is not understood.
    """
    if not re.fullmatch(f"{_HOST}(?:,{_HOST})*", nodelist):
        raise RuntimeError(f"Slurm's host list {nodelist!r} is not understood: set MASTER_ADDR to the host of rank 0")
    for host in re.findall(_HOST, nodelist):
        yield from _expand(host)


def _expand(host: str) -> Iterator[str]:
    bracket = re.search(_RANGES, host)
    if bracket is None:
        yield host
        return
    for part in bracket[0][1:-1].split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _expand(host[: bracket.start()] + str(number).zfill(len(first)) + host[bracket.end() :])


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise RuntimeError(f"{name} is {env[name]!r}, which is not a whole number: correct or unset it") from None


def _optional(env: Mapping[str, str], name: str) -> int | None:
    return _number(env, name) if env.get(name) else None


# ------------------------------------------------------------------------------------- what has to be found out


def _agree_through_mpi(job: Job) -> Job:
    """Takes rank 0's address, a free port there, and what else is missing, from MPI."""
    by_hand = "or set MASTER_ADDR and MASTER_PORT for every process"
    told = job.world_size is not None and job.address is not None and job.port is not None
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False  # no effect if the script has imported MPI before
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if told:
            return job
        absent = isinstance(error, ModuleNotFoundError) and error.name == "mpi4py"
        reason = "mpi4py is not installed" if absent else "mpi4py finds no MPI library"
        remedy = "pip install mpi4py" if absent else "put the folder of mpirun's libmpi into LD_LIBRARY_PATH"
        raise RuntimeError(f"mpirun started this process, but {reason}: {remedy}, {by_hand}") from error
    ours = not MPI.Is_initialized()
    if ours:
        MPI.Init()
    try:
        world = MPI.COMM_WORLD
        if job.world_size not in (None, world.size) or job.rank != world.rank:
            if told:
                return job
            library = re.split(r"[\n,\0]", MPI.Get_library_version())[0].strip()
            raise RuntimeError(
                f"mpirun says rank {job.rank} of {job.world_size}, but the MPI that mpi4py loaded, {library}, says "
                f"{world.rank} of {world.size}, so it is not mpirun's: put the folder of mpirun's libmpi into "
                f"LD_LIBRARY_PATH (with several MPIs installed, also set MPI4PY_MPIABI), {by_hand}"
            )
        node = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
        local_rank, alone = node.rank, node.size == world.size
        node.Free()
        mine = None
        if world.rank == 0:  # whose own MASTER_ADDR and MASTER_PORT count, since others may not have been given them
            mine = job.address or _own_address(alone), job.port or _ports.free_port()
        address, port = world.bcast(mine)
        return replace(job, world_size=world.size, local_rank=local_rank, address=address, port=port)
    finally:
        if ours:
            MPI.Finalize()


def _own_address(single_node: bool) -> str:
    """This host as the others reach it."""
    if single_node:
        return "127.0.0.1"
    return listening_address({})


def _device_index(job: Job, devices: int) -> int:
    """The CUDA device of this process. Raises RuntimeError if there are fewer than processes."""
    if devices == 1:
        return 0  # there is no choice; often the launcher has bound each process to one
    if job.local_rank is None:
        return job.rank % max(devices, 1)
    if job.local_rank >= devices:
        raise RuntimeError(
            f"local rank {job.local_rank} has no GPU, this host shows {devices}: start at most {devices} processes "
            'here, or ask for backend="gloo"'
        )
    return job.local_rank
